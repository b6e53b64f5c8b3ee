"""How a changed workload reaches its pods: what waits, what is blocked, when it is complete, and who goes first."""

import copy
from typing import Any

import pytest
from plan_world import NOW, World, described, manifest

from quire_contract import names
from quire_kube.times import format_time
from quire_operator.plan.actions import Annotate, Apply, SetReplicas
from quire_operator.plan.rollout import is_rollout_complete

REPLACE = {"strategy": "Replace", "waitForIdle": "60s"}


def served(spec: dict[str, Any] | None = None, num_pods: int = 1) -> tuple[World, list[str]]:
    world = World(manifest=manifest(spec))
    world.download()
    return world, [world.add_pod() for _ in range(num_pods)]


def changed(world: World) -> None:
    world.set_spec(engine={"maxModelLen": 2048})


def with_status(world: World, **status: int) -> None:
    live = copy.deepcopy(world.workload())
    live["metadata"]["generation"] = 2
    live["status"] = {"observedGeneration": 2, **status}
    ref = next(ref for ref in world.observed.children if ref.kind.kind == "Deployment")
    world.see(children={**world.observed.children, ref: live})


def test_surge_waits_for_nobody() -> None:
    world, _ = served()
    changed(world)
    plan = world.plan()
    assert "Apply Deployment/m" in described(plan.actions)
    assert (plan.needs_loads, plan.rollout_waiting) == (False, False)


def test_replace_waits_until_the_old_pods_are_idle() -> None:
    world, (pod,) = served({"rollout": REPLACE})
    changed(world)
    asking = world.plan()
    assert (asking.needs_loads, asking.rollout_waiting, asking.actions) == (True, True, ())
    assert asking.revision != world.workload()["metadata"]["labels"][names.LABEL_REVISION]
    world.see(loads={pod: 3})
    waiting = world.plan()
    assert (waiting.needs_loads, waiting.rollout_waiting, waiting.actions) == (False, True, ())
    assert waiting.requeue_after_s == 5
    world.see(loads={pod: 0})
    idle = world.plan()
    assert described(idle.actions) == ["Apply Deployment/m"]
    assert not idle.rollout_waiting


def test_replace_waits_no_longer_than_it_was_told() -> None:
    world, (pod,) = served({"rollout": REPLACE})
    changed(world)
    world.see(loads={pod: 3})
    world.set_status(rolloutWaitingSince=format_time(NOW - 58))
    assert world.plan().requeue_after_s == 2
    world.now += 2
    assert described(world.plan().actions) == ["Apply Deployment/m"]


def test_a_broken_revision_does_not_delay_its_repair() -> None:
    world, _ = served({"rollout": REPLACE}, num_pods=0)
    world.add_pod(is_ready=False)
    changed(world)
    assert described(world.plan().actions) == ["Apply Deployment/m"]


def test_replicas_change_while_a_template_waits() -> None:
    world, pods = served({"rollout": REPLACE, "replicas": 2}, num_pods=2)
    changed(world)
    world.set_spec(replicas=1)
    world.see(loads=dict.fromkeys(pods, 1))
    plan = world.plan()
    assert plan.rollout_waiting
    assert [type(action) for action in plan.actions] == [Annotate, Annotate, SetReplicas]
    world.settle()
    assert world.workload()["spec"]["replicas"] == 1
    world.set_spec(suspend=True)
    assert not world.plan().rollout_waiting


def test_the_idlest_pod_goes_first() -> None:
    world, (busy, idle, silent) = served({"replicas": 4}, num_pods=3)
    broken = world.add_pod(is_ready=False)
    ending = world.add_pod(deletionTimestamp="2027-01-15T08:00:00Z")
    world.set_spec(replicas=2)
    assert world.plan().needs_loads
    world.see(loads={busy: 7, idle: 0})
    plan = world.plan()
    costs = {a.ref.name: a.annotations for a in plan.actions if isinstance(a, Annotate)}
    key = names.ANNOTATION_POD_DELETION_COST
    assert costs == {busy: {key: "7"}, idle: {key: "0"}, silent: {key: "1"}, broken: {key: "-1"}}
    assert ending not in costs
    kinds = [type(action) for action in plan.actions]
    assert kinds.index(Apply) > max(i for i, kind in enumerate(kinds) if kind is Annotate)
    world.settle()


@pytest.mark.parametrize("replicas", [0, 3])
def test_no_costs_where_all_go_or_more_come(replicas: int) -> None:
    world, _ = served({"replicas": 2}, num_pods=2)
    world.set_spec(replicas=replicas, scaling={"max": 5})
    plan = world.plan()
    assert not plan.needs_loads
    assert not any(isinstance(action, Annotate) for action in plan.actions)


def test_when_a_rollout_is_complete() -> None:
    world, _ = served({"replicas": 2})
    revision = world.plan().revision
    assert not is_rollout_complete(world.observed, revision, 2)
    with_status(world, replicas=2, updatedReplicas=2, readyReplicas=2)
    assert is_rollout_complete(world.observed, revision, 2)
    assert not is_rollout_complete(world.observed, revision, 1)
    assert not is_rollout_complete(world.observed, "another", 2)
    with_status(world, replicas=3, updatedReplicas=2, readyReplicas=3)
    assert not is_rollout_complete(world.observed, revision, 2)
    with_status(world, replicas=2, updatedReplicas=2, readyReplicas=1)
    assert not is_rollout_complete(world.observed, revision, 2)
    with_status(world, replicas=2, updatedReplicas=2, readyReplicas=2, observedGeneration=1)
    assert not is_rollout_complete(world.observed, revision, 2)
