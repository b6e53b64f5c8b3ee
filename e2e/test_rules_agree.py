"""Every rule of the CRD, judged by a real API server: its verdicts are those of our own validation, case by case.

`tests/operator/test_validation.py` holds our own validation to the same files.
"""

import re
from typing import Any

import pytest
import yaml
from support.kubectl import Kubectl, run
from verdict_cases import BAD, GOOD, build_manifest


def judge(kubectl: Kubectl, manifest: dict[str, Any]) -> str:
    """Return what the API server has against a manifest; empty if nothing."""
    (manifest.get("metadata") or {}).pop("namespace", None)  # it need not exist
    words = kubectl.words("create", "--dry-run=server", "--validate=strict", "-f", "-")
    try:
        run(words, stdin=yaml.safe_dump(manifest))
    except AssertionError as refusal:
        return str(refusal)
    return ""


def path_as_the_api_server_writes_it(path: str) -> str:
    return re.sub(r"\[([a-zA-Z][^\]]*)\]", r".\1", path)


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case["case"])
def test_what_we_take_it_takes(rules_kubectl: Kubectl, case: dict[str, Any]) -> None:
    assert judge(rules_kubectl, build_manifest(case)) == ""


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["case"])
def test_what_we_refuse_it_refuses(rules_kubectl: Kubectl, case: dict[str, Any]) -> None:
    refusal = judge(rules_kubectl, build_manifest(case))
    assert refusal
    if any(problem["by"] == "unknown" for problem in case["problems"]):
        assert "unknown field" in refusal  # said before any rule is looked at
        return
    for problem in case["problems"]:
        assert problem["path"] in refusal or path_as_the_api_server_writes_it(problem["path"]) in refusal
        if problem["by"] == "rule":
            assert problem["message"] in refusal


def test_a_count_that_was_there_does_not_bar_other_changes(rules_kubectl: Kubectl) -> None:
    manifest = build_manifest({"name": "counted", "spec": {"scaling": {"min": 0, "max": 4}, "replicas": 4}})
    rules_kubectl.apply(manifest)
    manifest["spec"]["scaling"]["max"] = 2
    rules_kubectl.apply(manifest)
    manifest["spec"]["replicas"] = 3
    assert "spec.scaling.max" in rules_kubectl.refuse(manifest)
    rules_kubectl("delete", "llm", "counted")
