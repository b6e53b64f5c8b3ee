"""Healing that admission undoes on the way in, as a mutating webhook or policy does, is not called healing."""

import asyncio
from typing import Any

import pytest
from fake_kube import FakeKube
from store_objects import KEY

from quire_contract import names
from quire_kube.objects import Manifest, Ref
from quire_operator.apply.apply import Applied, apply_actions
from quire_operator.plan.actions import Apply
from quire_operator.spec.kinds import SERVICE, ref_of
from quire_operator.status.transitions import build_events
from quire_operator.watch.store import Store

NOW = 1_769_860_800.0


class WebhookKube(FakeKube):
    """An API server whose admission sets a field of every Service."""

    def __init__(self, patch: dict[str, Any]) -> None:
        super().__init__()
        self.patch = patch

    async def apply(self, manifest: Manifest) -> Manifest:
        await super().apply(manifest)
        return self.edit(ref_of(manifest), self.patch)


def _heal(kube: FakeKube) -> Applied:
    owner = {"apiVersion": names.GROUP_VERSION, "kind": names.KIND, "name": KEY.name, "uid": "llm-1"}
    metadata = {"name": "a", "namespace": "default", "ownerReferences": [owner]}
    wanted = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"externalName": "ours"}}
    store = Store()
    kube.put({**wanted, "spec": {"externalName": "theirs"}})
    store.put(kube.objects[Ref(kind=SERVICE, namespace="default", name="a")])
    heal = Apply(manifest=wanted, reason="Healed: spec.externalName was edited", is_drift=True)
    return asyncio.run(apply_actions(kube, store, (heal,), now=NOW))


@pytest.mark.parametrize(
    ("patch", "is_overruled"), [({"spec": {"externalName": "theirs"}}, True), ({"spec": {"type": "added"}}, False)]
)
def test_what_comes_back_is_compared_with_what_was_sent(patch: dict[str, Any], is_overruled: bool) -> None:
    applied = _heal(WebhookKube(patch))
    (done,) = applied.done
    assert isinstance(done, Apply)
    assert done.is_overruled is is_overruled
    assert applied.has_learned is not is_overruled, "or the same would be tried at once, again and again"
    manifest = {"metadata": {"name": KEY.name, "namespace": "default"}}
    (event,) = build_events(manifest, {}, {}, applied.done, (), NOW)
    healed = ("Normal", "Healed", "Service a: spec.externalName was edited")
    overruled = "is changed again whenever it is set, by an admission webhook or policy; it stays as that has it"
    expected = ("Warning", "Overruled", f"Service a: spec.externalName {overruled}") if is_overruled else healed
    assert (event["type"], event["reason"], event["message"]) == expected
