"""One reconcile after the other, with the real decisions: where does it end, and what does it cost to stay there?"""

import asyncio
import copy
import random
from typing import Any

import pytest
from fake_kube import make_llm
from operator_world import WatchEvent, World, names_of, settled_world

from quire_contract import names
from quire_kube.api import UnavailableError
from quire_kube.objects import Key, Manifest, Ref
from quire_operator.process.reconcile import Reconciler
from quire_operator.spec.kinds import DEPLOYMENT, EVENT, JOB, LLM_DEPLOYMENT, OWNED_KINDS, PERSISTENT_VOLUME_CLAIM, POD

KEY = Key(namespace="default", name="smollm2")
DEPLOYMENT_REF = Ref(kind=DEPLOYMENT, namespace="default", name="smollm2")
LLM_REF = Ref(kind=LLM_DEPLOYMENT, namespace="default", name="smollm2")


def outcome(world: World) -> dict[str, Any]:
    """Everything that must be the same however it came about: no uids, versions, times or Events."""
    found = {}
    for ref, manifest in sorted(world.kube.objects.items()):
        if ref.kind in (EVENT, POD):
            continue
        kept = copy.deepcopy(manifest)
        for name in ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields"):
            kept["metadata"].pop(name, None)
        for owner in kept["metadata"].get("ownerReferences", ()):
            owner.pop("uid")
        if ref.kind == LLM_DEPLOYMENT:
            status = kept["status"]
            conditions = {c["type"]: (c["status"], c["reason"], c["message"]) for c in status["conditions"]}
            kept["status"] = {"phase": status["phase"], "replicas": status["replicas"], "conditions": conditions}
        else:
            kept.pop("status", None)
        found[str(ref)] = kept
    return found


def test_a_manifest_becomes_a_model_that_serves() -> None:
    async def main() -> None:
        world = await settled_world()
        status = world.llm()["status"]
        assert (status["phase"], status["readyReplicas"], status["observedGeneration"]) == ("Ready", 1, 2)
        assert world.llm()["spec"]["replicas"] == 1
        assert not world.kube.of_kind(JOB), "a finished download is cleared away"
        assert world.errors == []

    asyncio.run(main())


def test_to_stay_costs_nothing_and_neither_does_a_restart() -> None:
    async def main() -> None:
        world = await settled_world()
        world.pending.add(KEY)
        await world.settle()
        assert world.kube.calls == []
        world.restart_operator()
        assert world.pending == {KEY}
        await world.settle()
        assert world.kube.calls == []

    asyncio.run(main())


def test_a_restart_before_the_listing_is_complete_writes_nothing() -> None:
    """Objects that the store does not know yet are asked for, not made again."""

    async def main() -> None:
        world = await settled_world()
        world.restart_operator()
        world.store.remove(world.kube.objects[DEPLOYMENT_REF])
        empty = World()
        empty.kube, empty.now = world.kube, world.now
        empty.reconciler = Reconciler(
            kube=world.kube,
            store=empty.store,
            cluster=empty.reconciler.cluster,
            settings=empty.reconciler.settings,
            prober=empty.prober,
            clock=lambda: empty.now,
        )
        empty.store.put(world.llm())
        claim = world.kube.of_kind(PERSISTENT_VOLUME_CLAIM)[0]
        empty.store.put(claim)
        await empty.reconciler.reconcile(KEY)
        assert [
            call for call in world.kube.writes if call[0] != "apply_status" and not call[1].startswith("Event")
        ] == []

    asyncio.run(main())


def test_the_second_of_a_model_downloads_nothing() -> None:
    async def main() -> None:
        world = await settled_world()
        world.kube.put(make_llm("another"))
        await world.settle()
        assert world.condition("Ready", "another")["status"] == "True"
        assert not [call for call in world.kube.writes if call[1].startswith(("Job", "PersistentVolumeClaim"))]

    asyncio.run(main())


def test_two_that_wait_for_one_download_both_go_on_when_it_is_done() -> None:
    async def main() -> None:
        world = World()
        world.kube.put(make_llm("one"))
        world.kube.put(make_llm("two"))
        await world.settle()
        assert {world.condition("Ready", name)["status"] for name in ("one", "two")} == {"True"}
        jobs = [call for call in world.kube.writes if call[0] == "apply" and call[1].startswith("Job")]
        assert len(jobs) == 1

    asyncio.run(main())


def test_whoever_edits_or_deletes_a_child_is_healed() -> None:
    async def main() -> None:
        world = await settled_world()
        before = outcome(world)
        children = [ref for ref in sorted(world.kube.objects) if ref.kind in OWNED_KINDS]
        assert len(children) >= 6
        for ref in children:
            spec_edit = {"spec": {"replicas": 7}} if ref == DEPLOYMENT_REF else {}
            edit = {"metadata": {"labels": {names.LABEL_MANAGED_BY: "me"}, "ownerReferences": None}, **spec_edit}
            world.kube.edit(ref, edit)
            await world.settle()
            assert outcome(world) == before, ref
            world.kube.edit(ref, {"metadata": {"labels": {names.LABEL_NAME: None}}})
            world.deliver()
            world.store.remove(world.kube.objects[ref])  # what a watch by this label says then
            await world.settle()
            assert outcome(world) == before, ref
            world.kube.remove(ref)
            await world.settle()
            assert outcome(world) == before, ref
        assert world.errors == []
        assert [e for e in world.kube.of_kind(EVENT) if e["reason"] == "Healed"]

    asyncio.run(main())


def count_calls() -> int:
    async def main() -> int:
        world = World()
        world.kube.put(make_llm())
        await world.settle()
        return len(world.kube.calls)

    return asyncio.run(main())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_any_call_may_fail_and_it_ends_in_the_same_place(after: bool) -> None:
    """`after`: the write was done and its answer was lost."""

    async def main(num_call: int) -> dict[str, Any]:
        world = World()
        world.kube.put(make_llm())
        world.kube.fail_at(num_call, after=after)
        await world.settle()
        has_failed = world.kube.calls[num_call][1].startswith("Event") or len(world.errors) == 1
        assert has_failed == (num_call >= 0), world.kube.calls[num_call]
        return outcome(world)

    expected = asyncio.run(settled_outcome())
    for num_call in range(count_calls()):
        assert asyncio.run(main(num_call)) == expected, num_call


async def settled_outcome() -> dict[str, Any]:
    return outcome(await settled_world())


@pytest.mark.parametrize("seed", range(8))
def test_events_that_come_late_and_out_of_order_cause_no_write(seed: int) -> None:
    """Each object's events may be overtaken by others', and by the operator's own knowledge of its writes."""

    def order(news: list[WatchEvent]) -> list[WatchEvent]:
        shuffled = list(news)
        random.Random(seed).shuffle(shuffled)
        return shuffled

    async def main() -> None:
        world = await settled_world()
        before = outcome(world)
        world._num_seen = 0  # all of history again
        world.deliver(order)
        await world.run_pending()
        world.deliver()
        await world.settle()
        assert world.kube.writes == []
        assert outcome(world) == before

    asyncio.run(main())


def test_a_watch_that_lags_behind_makes_no_second_write() -> None:
    async def main() -> None:
        world = World()
        world.kube.put(make_llm())
        world.deliver()
        for _ in range(5):  # nothing of what is written comes back
            world.pending.add(KEY)
            await world.run_pending()
        applied = [call for call in world.kube.calls if call[0] in ("apply", "patch", "delete")]
        assert len(applied) == len(set(applied))
        assert len([call for call in world.kube.calls if call[0] == "apply_status"]) == 1

    asyncio.run(main())


def test_a_gone_deployment_takes_its_volume_only_if_it_said_so() -> None:
    async def main(retain: bool) -> list[Manifest]:
        world = await settled_world(cache={"retain": retain})
        world.kube.remove(LLM_REF)
        await world.settle()
        assert {ref.kind for ref in world.kube.objects} <= {PERSISTENT_VOLUME_CLAIM, EVENT, POD}
        return world.kube.of_kind(PERSISTENT_VOLUME_CLAIM)

    assert len(asyncio.run(main(retain=True))) == 1
    assert asyncio.run(main(retain=False)) == []


def test_a_volume_is_not_collected_while_the_api_server_knows_a_user() -> None:
    """The store has heard of the volume and not yet of its user, as at a start."""

    async def main() -> None:
        world = await settled_world(cache={"retain": False})
        claim = world.kube.of_kind(PERSISTENT_VOLUME_CLAIM)[0]
        world.pending.clear()
        world.restart_operator()
        for ref, manifest in world.kube.objects.items():
            if ref.kind in (LLM_DEPLOYMENT, DEPLOYMENT, POD):
                world.store.remove(manifest)
        assert world.store.claims_without_users("default") == (claim,)
        await world.run_pending()
        assert world.kube.writes == []
        assert ("list", "LLMDeployment default/*") in world.kube.calls

    asyncio.run(main())


def test_a_volume_left_over_from_while_the_operator_was_down_is_collected() -> None:
    async def main() -> None:
        world = await settled_world(cache={"retain": False})
        world.kube.remove(LLM_REF)
        world.restart_operator()
        await world.settle()
        assert world.kube.of_kind(PERSISTENT_VOLUME_CLAIM) == []

    asyncio.run(main())


def mounted_claims(world: World) -> set[str]:
    volumes = world.kube.objects[DEPLOYMENT_REF]["spec"]["template"]["spec"]["volumes"]
    return {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}


def claims(world: World) -> set[str]:
    return set(names_of(world.kube.of_kind(PERSISTENT_VOLUME_CLAIM)))


@pytest.mark.parametrize("is_restarted", [False, True])
def test_another_models_download_leaves_the_volume_that_still_serves(is_restarted: bool) -> None:
    async def main() -> None:
        world = await settled_world(cache={"retain": False})
        old = mounted_claims(world)
        world.kube.edit(LLM_REF, {"spec": {"model": {"uri": "hf://other/model"}}})
        await world.settle(with_controllers=False)
        assert claims(world) > old, "the new model's volume is there, and the old one's still"
        if is_restarted:
            world.restart_operator()
            for ref, manifest in world.kube.objects.items():
                if ref.kind in (DEPLOYMENT, POD):  # of which the watch has not told yet
                    world.store.remove(manifest)
            world.pending.add(KEY)
            await world.run_pending()
            assert claims(world) > old
        await world.settle()
        assert claims(world) == mounted_claims(world) != old
        assert world.errors == []

    asyncio.run(main())


def test_the_last_pod_of_a_former_model_holds_its_volume() -> None:
    """While new pods do not get ready, the old ones may have to be made again."""

    async def main() -> None:
        world = await settled_world(cache={"retain": False})
        old = mounted_claims(world)
        (pod,) = [pod for pod in world.kube.of_kind(POD) if pod["metadata"]["name"].startswith("smollm2-")]
        pod["metadata"]["name"] = "kept"
        world.kube.put({**pod, "metadata": {**pod["metadata"], "ownerReferences": []}})
        world.kube.edit(LLM_REF, {"spec": {"model": {"uri": "hf://other/model"}}})
        await world.settle()
        assert claims(world) == mounted_claims(world) | old
        world.kube.remove(Ref(kind=POD, namespace="default", name="kept"))
        await world.settle()
        assert claims(world) == mounted_claims(world)

    asyncio.run(main())


def test_events_that_cannot_be_listed_hold_nothing_up() -> None:
    async def main() -> None:
        world = World()
        world.kube.refuse = lambda verb, ref: (
            UnavailableError("try later") if (verb, ref.kind) == ("list", EVENT) else None
        )
        world.kube.put(make_llm())
        await world.settle(with_controllers=False)
        world.now += 60
        world.pending.add(KEY)
        await world.settle()
        assert ("list", "Event default/*") in world.kube.calls
        assert world.errors == []
        assert world.condition("Ready")["status"] == "True"

    asyncio.run(main())


def test_fewer_replicas_take_the_idlest_pod() -> None:
    async def main() -> None:
        world = await settled_world(replicas=3, scaling={"max": 4})
        pods = names_of(world.kube.of_kind(POD))
        serving = [name for name in pods if not name.startswith("quire-download")]
        world.prober.loads = {serving[0]: 5, serving[1]: 0, serving[2]: 2}
        world.kube.edit(LLM_REF, {"spec": {"replicas": 2}})
        world.deliver()
        await world.run_pending()
        verbs = [call for call in world.kube.calls if call[1].startswith(("Pod", "Deployment"))]
        assert verbs[-1] == ("apply", "Deployment default/smollm2")
        assert [call[0] for call in verbs[:-1]] == ["patch"] * len(verbs[:-1]) != []
        costs = {
            pod["metadata"]["name"]: int(pod["metadata"]["annotations"][names.ANNOTATION_POD_DELETION_COST])
            for pod in world.kube.of_kind(POD)
            if names.ANNOTATION_POD_DELETION_COST in (pod["metadata"].get("annotations") or {})
        }
        assert costs.get(serving[1], 0) == min(costs.values())
        assert costs[serving[0]] > costs[serving[2]]

    asyncio.run(main())
