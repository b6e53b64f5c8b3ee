"""Every manifest of `verdicts/`, and what `quire up` says of files that hold no manifest."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from verdict_cases import BAD, GOOD, build_manifest

from quire_operator.spec.validation import DocumentError, load_documents, validate_manifest, validate_status


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case["case"])
def test_a_good_manifest_has_no_problem(case: dict[str, Any]) -> None:
    assert validate_manifest(build_manifest(case)) == ()


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["case"])
def test_a_bad_manifest_has_exactly_these_problems(case: dict[str, Any]) -> None:
    found = sorted((problem.path, problem.message) for problem in validate_manifest(build_manifest(case)))
    assert found == sorted((problem["path"], problem["message"]) for problem in case["problems"])


def test_validation_leaves_the_manifest_alone() -> None:
    manifest = build_manifest({"spec": {"engine": {"quantization": None}}})
    before = yaml.safe_dump(manifest)
    validate_manifest(manifest)
    assert yaml.safe_dump(manifest) == before


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"apiVersion": "quire.dev/v2"}, "apiVersion", "must be quire.dev/v1alpha1, not quire.dev/v2"),
        ({"apiVersion": None}, "apiVersion", "must be quire.dev/v1alpha1"),
        ({"kind": "Deployment"}, "kind", "must be LLMDeployment, not Deployment"),
        ({"metadata": None}, "metadata", "is required"),
        ({"metadata": {}}, "metadata.name", "is required"),
        ({"metadata": []}, "metadata", "must be a mapping"),
        ({"metadata": {"name": "m", "label": {}}}, "metadata.label", "unknown field; is labels meant?"),
        (
            {"metadata": {"name": "m", "labels": {"tier": 1}}},
            "metadata.labels[tier]",
            'must be a string; write it in quotes: "1"',
        ),
    ],
)
def test_what_surrounds_the_spec_is_looked_at(change: dict[str, Any], path: str, message: str) -> None:
    problems = validate_manifest(build_manifest({}) | change)
    assert [(problem.path, problem.message) for problem in problems] == [(path, message)]


def test_a_problem_reads_as_path_and_message() -> None:
    (problem,) = validate_manifest(build_manifest({"spec": {"scaling": {"min": 5, "max": 4}}}))
    assert str(problem) == "spec.scaling.min: must be ≤ spec.scaling.max (5 > 4); raise max or lower min"


def test_a_status_of_the_design_is_valid() -> None:
    condition = {
        "type": "Ready",
        "status": "True",
        "observedGeneration": 3,
        "lastTransitionTime": "2026-01-31T12:00:00Z",
        "reason": "ScaledToZero",
        "message": "Zero replicas are wanted, and the gateway wakes the model.",
    }
    change = {"time": "2026-01-31T12:00:00Z", "from": 1, "to": 0, "demand": 0, "reason": "idle for 600 s"}
    status = {
        "observedGeneration": 3,
        "phase": "ScaledToZero",
        "reason": "",
        "replicas": 0,
        "readyReplicas": 0,
        "pendingReplicas": 0,
        "selector": "quire.dev/deployment=m",
        "endpoint": "http://m.default.svc/v1",
        "model": {
            "revision": "abc",
            "bytes": 1 << 34,
            "download": {"percent": 99.5, "bytesPerSecond": 1, "etaSeconds": 1},
        },
        "fit": {"weightsBytes": 1, "kvBytesPerToken": 1, "kvCapacityTokens": 1, "maxConcurrentSequences": 1},
        "coldStart": {"lastSeconds": 7.5, "p50Seconds": 8, "stages": {"pull": 1.5, "load": 2}},
        "scaling": {"demand": 0, "desired": 0, "reason": "idle", "history": [change] * 5},
        "performance": {"outputTokensPerSecond": 210.5, "timeToFirstTokenSeconds": 0.05},
        "conditions": [condition],
    }
    assert validate_status(status) == ()
    status["scaling"] = {"history": [change] * 6}
    status["conditions"] = [condition, condition | {"reason": "two words", "lastTransitionTime": "yesterday"}]
    assert sorted(str(problem) for problem in validate_status(status)) == [
        "status.conditions[1].lastTransitionTime: must be a time such as 2026-01-31T12:00:00Z",
        "status.conditions[1].reason: must match ^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        "status.conditions[1]: must not repeat 'Ready'",
        "status.scaling.history: must have at most 5 items",
    ]


class TestLoadDocuments:
    def test_reads_every_document_and_passes_over_empty_ones(self, tmp_path: Path) -> None:
        file = tmp_path / "m.yaml"
        file.write_text("---\n# nothing\n---\na: 1\n---\nb: {c: 2}\n...\n")
        assert load_documents(file) == [{"a": 1}, {"b": {"c": 2}}]

    def test_reads_values_as_kubectl_does(self, tmp_path: Path) -> None:
        file = tmp_path / "m.yaml"
        file.write_text("base: &base {x: 1}\nrevision: 2026-01-31\nmode: Off\nmerged: {<<: *base, y: 2}\n")
        assert load_documents(file) == [
            {"base": {"x": 1}, "revision": "2026-01-31", "mode": False, "merged": {"x": 1, "y": 2}}
        ]

    @pytest.mark.parametrize(
        ("text", "line", "message"),
        [
            ("a: 1\n---\nb: [1,\n", 4, "did not find expected node content"),
            ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", 5, "'c' is given twice"),
            ("a: 1\n---\n- b\n", 3, "a manifest is a mapping (apiVersion: …)"),
            ("a: 1\nb: *missing\n", 2, "found undefined alias"),
            ("a: 1\n---\nb: " + "[" * 300 + "]" * 300, 3, "it is nested too deeply"),
            ("a: 1\n---\nb: " + "[" * 1100 + "]" * 1100, 3, "exceeded maximum nesting depth"),
            ("a: 1\nb: !!python/object:os.system x\n", 2, "could not determine a constructor"),
        ],
    )
    def test_names_file_and_line(self, tmp_path: Path, text: str, line: int, message: str) -> None:
        file = tmp_path / "m.yaml"
        file.write_text(text)
        with pytest.raises(DocumentError) as caught:
            load_documents(file)
        assert str(caught.value).startswith(f"{file}:{line}: {message}")

    def test_refuses_what_is_no_text(self, tmp_path: Path) -> None:
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF\xff\xfe")
        with pytest.raises(DocumentError, match="not UTF-8"):
            load_documents(file)

    def test_a_missing_file_is_an_os_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load_documents(tmp_path / "none.yaml")
