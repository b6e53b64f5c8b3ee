"""Deleting leaves nothing but the model's files, and those too where they are not to be kept. Nothing hangs."""

from support.chart import Chart
from support.kubectl import Kubectl, wait_for
from support.manifests import llm
from support.traffic import wait_ready

KINDS = "deployments,replicasets,pods,services,endpointslices,serviceaccounts,poddisruptionbudgets,networkpolicies,jobs"


def left(kubectl: Kubectl, name: str) -> list[str]:
    objects = kubectl.list(KINDS) + kubectl.list("llm")
    return [f"{one['kind']} {one['metadata']['name']}" for one in objects if name in one["metadata"]["name"]]


def wait_gone(kubectl: Kubectl, name: str) -> None:
    wait_for(
        f"nothing left of {name}",
        lambda: not left(kubectl, name),
        timeout_s=90,
        describe=lambda: str(left(kubectl, name)),
    )


def test_all_goes_but_the_cache(kubectl: Kubectl) -> None:
    kubectl.apply(llm("kept"))
    wait_ready(kubectl, "kept")
    assert "finalizers" not in kubectl.llm("kept")["metadata"]
    kubectl("delete", "llm", "kept", "--timeout=30s")
    wait_gone(kubectl, "kept")
    claims = kubectl.list("pvc")
    assert len(claims) == 1
    assert "deletionTimestamp" not in claims[0]["metadata"]

    kubectl.apply(llm("kept-again"))
    wait_ready(kubectl, "kept-again")
    assert kubectl.list("pvc")[0]["metadata"]["uid"] == claims[0]["metadata"]["uid"]
    assert kubectl.llm("kept-again")["status"]["coldStart"]["stages"].keys().isdisjoint({"download"})


def test_the_cache_goes_with_its_last_user(kubectl: Kubectl) -> None:
    cache = {"size": "1Gi", "retain": False}
    kubectl.apply(llm("one", cache=cache), llm("two", cache=cache))
    wait_ready(kubectl, "one")
    wait_ready(kubectl, "two")
    kubectl("delete", "llm", "one", "--timeout=30s")
    wait_gone(kubectl, "one")
    assert len(kubectl.list("pvc")) == 1
    kubectl("delete", "llm", "two", "--timeout=30s")
    wait_gone(kubectl, "two")
    wait_for("the claim goes", lambda: not kubectl.list("pvc"), timeout_s=60, describe=kubectl.describe_all)


def test_uninstall_first_then_delete(kubectl: Kubectl, chart: Chart) -> None:
    kubectl.apply(llm("orphan"))
    wait_ready(kubectl, "orphan")
    chart.uninstall()
    try:
        kubectl("delete", "llm", "orphan", "--timeout=30s")
        wait_gone(kubectl, "orphan")
        kubectl("delete", "namespace", kubectl.namespace, "--timeout=60s", timeout_s=90)
    finally:
        chart.install()
