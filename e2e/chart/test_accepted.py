"""Every object of the chart and of the plain manifest, judged by a real API server within the restricted profile."""

import re
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from support.kubectl import Kubectl

ROOT = Path(__file__).resolve().parents[2]
CASES = sorted((ROOT / "charts" / "quire" / "ci").glob("*-values.yaml"))
OPTIONAL = ("PodMonitor", "PrometheusRule")
"""Kinds that a cluster may not have; `test_renderings.py` checks them."""


def judge(documents: list[dict[str, Any]], apply_dry: Callable[[dict[str, Any]], None]) -> int:
    judged = [document for document in documents if document["kind"] not in OPTIONAL]
    for document in judged:
        apply_dry(document)
    return len(judged)


@pytest.mark.parametrize("values", CASES, ids=lambda values: values.stem.removesuffix("-values"))
def test_the_chart_is_accepted(
    rendering: ModuleType, apply_dry: Callable[[dict[str, Any]], None], values: Path
) -> None:
    assert judge(list(yaml.safe_load_all(rendering.render("--values", values))), apply_dry) > 5


def test_the_plain_manifest_is_accepted_and_is_the_chart(
    rendering: ModuleType, apply_dry: Callable[[dict[str, Any]], None]
) -> None:
    folder = ROOT / "deploy" / "kustomize"
    built = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
    documents = list(yaml.safe_load_all(built))

    def key(document: dict[str, Any]) -> tuple[str, str, str]:
        metadata = document["metadata"]
        return document["kind"], metadata.get("namespace", ""), metadata["name"]

    chart = {key(one) for one in yaml.safe_load_all(rendering.render())}
    assert {key(one) for one in documents} == chart | {("Namespace", "", "quire-system")}
    managers = {one["metadata"]["labels"].get("app.kubernetes.io/managed-by") for one in documents}
    assert managers == {"kustomize"}
    assert judge(documents, apply_dry) == len(documents)


def test_the_notes_say_what_comes_next(rendering: ModuleType, rules_kubectl: Kubectl) -> None:
    def notes(*flags: str) -> str:
        said: str = rendering.helm(
            *("upgrade", "--install", "quire", ROOT / "charts" / "quire", "--namespace", "quire-system"),
            *("--kubeconfig", rules_kubectl.kubeconfig, "--dry-run=server", "--set", "crds.enabled=false", *flags),
        )
        return said.partition("NOTES:")[2]

    plain = notes()
    assert "kubectl --namespace default get llm" in plain
    assert "crds/llmdeployment.yaml" in plain
    assert "spec.replicas is what runs" in plain
    found = re.search(r"<<EOF\n(.*?)  EOF", plain, re.DOTALL)
    assert found is not None
    rules_kubectl("apply", "--dry-run=server", "-f", "-", stdin=found[1])
    mark = "storageclass.kubernetes.io/is-default-class"
    defaults = [(one["metadata"].get("annotations") or {}).get(mark) for one in rules_kubectl.list("storageclasses")]
    assert ("no StorageClass is the default" in plain) is (bool(defaults) and "true" not in defaults)
    assert "knows no model" in notes("--set", "gateway.enabled=true")
    scoped = notes("--set", "rbac.scope=namespace", "--set", "namespaces={team-a,team-b}")
    assert "team-a, team-b" in scoped
    assert "smollm2.team-a.svc" in scoped


def test_whoever_may_install_into_a_namespace_alone_is_told_what_comes_next(
    rendering: ModuleType, rules_kubectl: Kubectl
) -> None:
    name = f"chart-{uuid.uuid4().hex[:8]}"
    rules_kubectl("create", "namespace", name)
    try:
        rules_kubectl.inside(name)("create", "rolebinding", "installer", "--clusterrole=admin", "--user=installer")
        said = rendering.helm(
            *("install", "quire", ROOT / "charts" / "quire", "--namespace", name, "--kube-as-user", "installer"),
            *("--kubeconfig", rules_kubectl.kubeconfig, "--dry-run=server", "--set", "crds.enabled=false"),
            *("--set", "rbac.scope=namespace"),
        )
        assert f"smollm2.{name}.svc" in said
    finally:
        rules_kubectl("delete", "namespace", name, "--wait=false")
