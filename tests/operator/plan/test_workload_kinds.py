"""One pod per replica or several: which workload that is, and how one takes over from the other."""

from dataclasses import replace
from typing import Any

import pytest
from plan_world import CLUSTER, WORKLOAD, World, described, manifest, served

from quire_contract import names
from quire_kube.objects import Ref
from quire_operator.plan import acceptance
from quire_operator.plan.rollout import live_workload
from quire_operator.spec.kinds import DEPLOYMENT, LEADER_WORKER_SET, NETWORK_POLICY, SERVICE
from quire_operator.watch.cluster import ClusterFacts

GROUP = {"pipelineParallelSize": 2, "maxModelLen": 128}
SINGLE = {"maxModelLen": 128}
GROUP_WORKLOAD = Ref(kind=LEADER_WORKER_SET, namespace="ns", name="m")
WITH_GROUPS = replace(CLUSTER, kinds=frozenset({LEADER_WORKER_SET}))
KIND_CHANGES = [(SINGLE, GROUP, WORKLOAD, GROUP_WORKLOAD), (GROUP, SINGLE, GROUP_WORKLOAD, WORKLOAD)]


@pytest.fixture(autouse=True)
def _serves_many_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the version whose server uses more than one device; `test_acceptance.py` has what this one refuses."""
    monkeypatch.setattr(acceptance, "_check_one_device", lambda deployment: None)


def test_several_pods_per_replica_are_a_leader_worker_set() -> None:
    cluster = ClusterFacts(has_default_storage_class=True, kinds=frozenset({LEADER_WORKER_SET}))
    world = World(manifest=manifest({"engine": {"pipelineParallelSize": 2, "maxModelLen": 128}}), cluster=cluster)
    world.download()
    assert [ref.kind for ref in world.observed.children if ref.kind in (DEPLOYMENT, LEADER_WORKER_SET)] == [
        LEADER_WORKER_SET
    ]
    world.set_spec(engine={"maxModelLen": 128})
    texts = described(world.plan().actions)
    assert texts.index("Apply Deployment/m") < texts.index("Delete LeaderWorkerSet/m")
    world.settle()


def set_ready(world: World, ref: Ref, num: int = 1) -> None:
    live = {**world.observed.children[ref], "status": {"readyReplicas": num}}
    world.see(children={**world.observed.children, ref: live})


def leads_to_leaders(world: World) -> set[bool]:
    services = [child for ref, child in world.observed.children.items() if ref.kind == SERVICE]
    return {"leaderworkerset.sigs.k8s.io/worker-index" in service["spec"]["selector"] for service in services}


def lets_groups_talk(world: World) -> bool:
    (policy,) = (child for ref, child in world.observed.children.items() if ref.kind == NETWORK_POLICY)
    return len(policy["spec"]["ingress"]) > 1


@pytest.mark.parametrize(("before", "after", "old", "new"), KIND_CHANGES)
def test_another_kind_of_workload_takes_over_when_it_is_ready(
    before: dict[str, Any], after: dict[str, Any], old: Ref, new: Ref
) -> None:
    world = served({"engine": before}, cluster=WITH_GROUPS)
    set_ready(world, old)
    world.now += 60
    world.set_spec(engine=after)
    revision = world.settle().revision
    assert {old, new} <= world.observed.children.keys()
    assert leads_to_leaders(world) == {old == GROUP_WORKLOAD}
    assert lets_groups_talk(world)
    live = live_workload(world.observed)
    assert live is not None
    assert (live[0], live[1]["metadata"]["labels"][names.LABEL_REVISION]) == (new, revision)
    set_ready(world, new)
    texts = described(world.plan().actions)
    assert texts.index("Apply Service/m") < texts.index(f"Delete {old.kind.kind}/m")
    world.settle()
    assert old not in world.observed.children
    assert leads_to_leaders(world) == {new == GROUP_WORKLOAD}
    assert lets_groups_talk(world) is (new == GROUP_WORKLOAD)


@pytest.mark.parametrize(("before", "after", "old", "new"), KIND_CHANGES)
@pytest.mark.parametrize("spec", [{"rollout": {"strategy": "Replace"}}, {"replicas": 0}])
def test_a_workload_of_another_kind_goes_first_where_nothing_is_to_serve_beside_it(
    before: dict[str, Any], after: dict[str, Any], old: Ref, new: Ref, spec: dict[str, Any]
) -> None:
    world = served({"engine": before}, cluster=WITH_GROUPS)
    set_ready(world, old)
    world.set_spec(engine=after, **spec)
    world.settle()
    assert old not in world.observed.children
    assert leads_to_leaders(world) == {new == GROUP_WORKLOAD}


@pytest.mark.parametrize(("before", "after", "old", "new"), KIND_CHANGES)
def test_a_closed_gate_turns_no_service_to_another_kind_of_workload(
    before: dict[str, Any], after: dict[str, Any], old: Ref, new: Ref
) -> None:
    world = served({"engine": before}, cluster=WITH_GROUPS)
    world.set_spec(engine=after, model={"uri": "hf://a/other"}, rollout={"strategy": "Replace"})
    world.see(volume=None, job=None, job_pods=())
    world.settle()
    assert old in world.observed.children
    assert new not in world.observed.children
    assert leads_to_leaders(world) == {old == GROUP_WORKLOAD}


def test_a_workload_of_another_kind_waits_for_idle_pods_with_its_services() -> None:
    world = served({"engine": SINGLE, "rollout": {"strategy": "Replace", "waitForIdle": "60s"}}, cluster=WITH_GROUPS)
    busy = world.add_pod()
    world.see(loads={busy: 1})
    world.set_spec(engine=GROUP)
    assert world.settle().rollout_waiting
    assert WORKLOAD in world.observed.children
    assert leads_to_leaders(world) == {False}
    world.see(loads={busy: 0})
    world.settle()
    assert WORKLOAD not in world.observed.children
    assert leads_to_leaders(world) == {True}
