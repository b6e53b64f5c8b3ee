"""The operator's role allows what its code calls, and nothing besides.

What is called is recorded, as RBAC names it, from a fake API server. The role is the plain manifest's, which
`e2e/chart` holds equal to the chart.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import yaml
from fake_kube import FakeKube
from operator_world import settled_world
from store_objects import llm, make

from quire_contract import names
from quire_kube.api import InvalidError, KubeError
from quire_kube.objects import Kind, Ref
from quire_operator.apply.apply import apply_actions
from quire_operator.plan.actions import Action, Annotate, Apply, Delete, SetReplicas
from quire_operator.spec.kinds import (
    EVENT,
    LEASE,
    LLM_DEPLOYMENT,
    OWNED_KINDS,
    POD,
    SHARED_KINDS,
    STORAGE_CLASS,
    ref_of,
)
from quire_operator.watch.kopf_watch.handlers import WATCHED_KINDS
from quire_operator.watch.store import Store

PLAIN_MANIFEST = Path(__file__).resolve().parents[3] / "deploy" / "kustomize" / "quire.yaml"
Right = tuple[str, str, str]
"""API group, resource and verb."""


def allowed() -> set[Right]:
    documents = yaml.safe_load_all(PLAIN_MANIFEST.read_text())
    roles = [one for one in documents if one["kind"] in ("Role", "ClusterRole")]
    return {
        (group, resource, verb)
        for role in roles
        if role["metadata"]["name"] in ("quire-operator", "quire-operator-leader")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def rights(kind: Kind, *verbs: str, subresource: str = "") -> set[Right]:
    return {(kind.group, kind.plural + subresource, verb) for verb in verbs}


def record(kube: FakeKube, *, refuses: bool = False) -> set[Right]:
    """Return what is called from now on, growing. `refuses`: an object that is there must be put whole first."""
    called: set[Right] = set()
    replaced: set[Ref] = set()

    def hear(verb: str, ref: Ref) -> KubeError | None:
        if verb == "apply_status":
            called.update(rights(ref.kind, "patch", subresource="/status"))
        elif verb == "apply":  # an API server asks for the right to create where there is nothing to patch
            called.update(rights(ref.kind, "patch", *(() if ref in kube.objects else ("create",))))
        else:
            called.update(rights(ref.kind, verb))
        if verb == "update":
            replaced.add(ref)
        is_refused = refuses and verb == "apply" and ref in kube.objects and ref not in replaced
        return InvalidError("duplicate") if is_refused else None

    kube.refuse = hear
    return called


def called_for_children() -> set[Right]:
    """Make a child of each kind, heal it and delete it."""
    kube, store = FakeKube(), Store()
    called = record(kube, refuses=True)

    def act(*actions: Action) -> None:
        applied = asyncio.run(apply_actions(kube, store, actions, now=0.0))
        assert (applied.failure, applied.refusals) == (None, ())

    for kind in (*OWNED_KINDS, *SHARED_KINDS):
        document = make(kind, "m", labels={names.LABEL_MANAGED_BY: names.MANAGED_BY})
        document["metadata"] = {key: document["metadata"][key] for key in ("name", "namespace", "labels")}
        ref = ref_of(document)
        act(Apply(manifest=document, reason="Created"))
        act(Apply(manifest=document, reason="Healed"))
        act(Delete(ref=ref, uid=kube.objects[ref]["metadata"]["uid"], reason="Pruned"))
        assert ref not in kube.objects
    kube.put(llm())
    kube.put(make(POD, "m"))
    act(
        SetReplicas(ref=ref_of(llm()), replicas=1, reason="Created"),
        Annotate(ref=ref_of(make(POD, "m")), annotations={"a": "b"}, reason="Load"),
    )
    return called


def called_to_report() -> set[Right]:
    """Change a deployment that serves."""

    async def main() -> set[Right]:
        world = await settled_world()
        called = record(world.kube)
        world.kube.edit(Ref(kind=LLM_DEPLOYMENT, namespace="default", name="smollm2"), {"spec": {"suspend": True}})
        await world.settle()
        return called

    return asyncio.run(main())


def called_to_read() -> Iterator[Right]:
    for kind in WATCHED_KINDS:
        yield from rights(kind, "list", "watch")
    yield from rights(EVENT, "list")
    yield from rights(STORAGE_CLASS, "list")


def test_the_role_allows_what_is_called_and_nothing_besides() -> None:
    lease = rights(LEASE, "get", "create", "update")
    called = called_for_children() | called_to_report() | set(called_to_read()) | lease
    assert called - allowed() == set()
    assert allowed() - called == set()
