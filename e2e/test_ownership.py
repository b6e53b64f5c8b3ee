"""Who owns which field of a child, by a real API server's account: what the operator no longer wants goes, what others
have added stays, and an object of the same name that is somebody else's is never touched."""

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kubectl import Kubectl, wait_for

from quire_contract.names import FIELD_MANAGER
from quire_kube.client import KubeClient
from quire_kube.connection import load_connection
from quire_operator.apply.apply import Applied, apply_actions
from quire_operator.plan.actions import Apply
from quire_operator.plan.drift import is_applied
from quire_operator.spec.kinds import ref_of
from quire_operator.watch.ownership import WHOLE_MANAGER
from quire_operator.watch.store import Store

Document = dict[str, Any]
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "operator" / "golden" / "minimal-cpu.yaml"
CREATED_WHOLE = ("ServiceAccount", "Service", "PodDisruptionBudget", "NetworkPolicy")
CHILDREN = [document for document in yaml.safe_load_all(GOLDEN.read_text()) if document["kind"] in CREATED_WHOLE]


class Writer:
    """Applies documents as the operator does, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._store = Store()

    def __call__(self, document: Document) -> Applied:
        async def main() -> Applied:
            client = KubeClient(load_connection, ref_of, lambda verb, plural, status: self.calls.append(verb))
            async with client as kube:
                return await apply_actions(kube, self._store, [Apply(manifest=document, reason="Test")], now=0.0)

        self.calls.clear()
        applied = asyncio.run(main())
        assert applied.failure is None
        return applied


@pytest.fixture
def write(restricted: Kubectl, monkeypatch: pytest.MonkeyPatch) -> Writer:
    monkeypatch.setenv("KUBECONFIG", str(restricted.kubeconfig))
    return Writer()


def child(document: Document, namespace: str | None) -> Document:
    document = copy.deepcopy(document)
    document["metadata"]["namespace"] = namespace
    document["metadata"].pop("ownerReferences")  # there is no LLMDeployment
    return document


def live(kubectl: Kubectl, document: Document) -> Document:
    words = (document["kind"], document["metadata"]["name"], "-o", "json", "--show-managed-fields")
    found: Document = json.loads(kubectl("get", *words))
    return found


def wait_settled(kubectl: Kubectl, document: Document) -> None:
    """Wait until the disruption controller has written its first status, which is a change of the object too."""
    if document["kind"] == "PodDisruptionBudget":
        wait_for(
            "the budget's status",
            lambda: "observedGeneration" in live(kubectl, document).get("status", {}),
            timeout_s=90,
        )


def managers(found: Document) -> set[tuple[str, str]]:
    return {(entry["manager"], entry["operation"]) for entry in found["metadata"]["managedFields"]}


@pytest.mark.parametrize("golden", CHILDREN, ids=lambda golden: f"{golden['kind']}-{golden['metadata']['name']}")
def test_what_was_created_and_is_wanted_no_more_goes(restricted: Kubectl, write: Writer, golden: Document) -> None:
    document = child(golden, restricted.namespace)
    longer = copy.deepcopy(document)
    longer["metadata"]["annotations"]["quire.dev/former"] = "x"
    longer["metadata"]["labels"]["quire.dev/former"] = "x"
    assert write(longer).done
    assert write.calls == ["create"]
    wait_settled(restricted, document)
    assert (WHOLE_MANAGER, "Update") in managers(live(restricted, document))
    restricted.patch(document["kind"], document["metadata"]["name"], {"metadata": {"labels": {"theirs": "stays"}}})
    for calls in (["get", "patch", "apply"], ["apply"]):
        write(document)
        assert write.calls == calls
        found = live(restricted, document)
        assert found["metadata"]["labels"] == {**document["metadata"]["labels"], "theirs": "stays"}
        assert found["metadata"]["annotations"] == document["metadata"]["annotations"]
        assert (FIELD_MANAGER, "Apply") in managers(found)
        assert WHOLE_MANAGER not in {manager for manager, _ in managers(found)}
        assert is_applied(document, found)


@pytest.mark.parametrize("golden", CHILDREN, ids=lambda golden: f"{golden['kind']}-{golden['metadata']['name']}")
def test_somebody_elses_object_is_not_taken_over(restricted: Kubectl, write: Writer, golden: Document) -> None:
    document = child(golden, restricted.namespace)
    theirs = copy.deepcopy(document)
    theirs["metadata"] = {key: document["metadata"][key] for key in ("name", "namespace")}
    restricted.apply(theirs)
    wait_settled(restricted, document)
    before = live(restricted, document)
    (refusal,) = write(document).refusals
    assert refusal.as_verdict().reason == "NameTaken"
    assert live(restricted, document) == before


def test_an_edited_merge_key_heals_and_leaves_no_trace(restricted: Kubectl, write: Writer) -> None:
    document = child(next(golden for golden in CHILDREN if golden["kind"] == "Service"), restricted.namespace)
    write(document)
    name, ports = document["metadata"]["name"], [{"name": "http", "port": 81, "targetPort": 8000}]
    for _ in range(2):
        restricted.patch("service", name, {"spec": {"ports": ports}})
        write(document)
        found = live(restricted, document)
        assert [port["port"] for port in found["spec"]["ports"]] == [80]
        assert WHOLE_MANAGER not in {manager for manager, _ in managers(found)}
    write(document)
    assert write.calls == ["apply"]
