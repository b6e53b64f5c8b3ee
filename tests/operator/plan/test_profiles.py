"""Which profile the pods get, and when the next is tried."""

from typing import Any

import pytest
from plan_world import NOW, World, manifest

from quire_kube.times import format_time
from quire_operator.spec.settings import parse_settings


def profile(memory: str = "8Gi", **fields: Any) -> dict[str, Any]:
    return {"resources": {"limits": {"memory": memory}}, **fields}


def served(profiles: dict[str, Any], spec: dict[str, Any] | None = None) -> World:
    world = World(
        manifest=manifest({"resources": None, "profiles": list(profiles), **(spec or {})}),
        settings=parse_settings({"profiles": profiles}),
    )
    world.download()
    return world


def test_the_first_is_used_until_it_finds_no_node_for_too_long() -> None:
    world = served({"a": profile(nodeSelector={"pool": "a"}, fallbackAfter="2m"), "b": profile(), "c": profile()})
    assert world.plan().profile == "a"
    world.set_status(activeProfile={"name": "a", "since": format_time(NOW - 500)})
    world.add_pod(is_ready=False, unschedulable_since=NOW - 100)
    waiting = world.plan()
    assert (waiting.profile, waiting.requeue_after_s, waiting.actions) == ("a", 20, ())
    world.now += 20
    assert world.settle().profile == "b"
    assert "nodeSelector" not in world.workload()["spec"]["template"]["spec"]
    world.set_status(activeProfile={"name": "b", "since": format_time(world.now)})
    world.add_pod(is_ready=False, unschedulable_since=world.now)
    later = world.plan()
    assert (later.profile, later.requeue_after_s) == ("b", 300)


def test_the_wait_of_a_profile_begins_with_it() -> None:
    world = served({"a": profile(), "b": profile(), "c": profile()})
    world.set_status(activeProfile={"name": "b", "since": format_time(NOW - 10)})
    world.settle()
    world.add_pod(is_ready=False, unschedulable_since=NOW - 1000)
    plan = world.plan()
    assert (plan.profile, plan.requeue_after_s) == ("b", 290)


def test_the_last_stays() -> None:
    world = served({"a": profile(), "b": profile()})
    world.set_status(activeProfile={"name": "b", "since": format_time(NOW - 9000)})
    world.settle()
    world.add_pod(is_ready=False, unschedulable_since=NOW - 8000)
    plan = world.plan()
    assert (plan.profile, plan.requeue_after_s) == ("b", None)


def test_replicas_that_run_are_not_moved_because_one_more_finds_no_node() -> None:
    world = served({"a": profile(), "b": profile()}, {"replicas": 2})
    world.set_status(activeProfile={"name": "a", "since": format_time(NOW - 9000)})
    world.add_pod()
    world.add_pod(is_ready=False, unschedulable_since=NOW - 8000)
    assert world.plan().profile == "a"


@pytest.mark.parametrize("spec", [{"replicas": 0}, {"suspend": True}])
def test_the_first_is_tried_again_after_a_sleep(spec: dict[str, Any]) -> None:
    world = served({"a": profile(), "b": profile()})
    world.set_status(activeProfile={"name": "b", "since": format_time(NOW)})
    assert world.plan().profile == "b"
    world.set_spec(**spec)
    assert world.plan().profile == "a"


def test_an_active_profile_that_left_the_list() -> None:
    world = served({"a": profile(), "b": profile()})
    world.set_status(activeProfile={"name": "gone", "since": format_time(NOW)})
    assert world.plan().profile == "a"


def test_a_profile_that_the_model_does_not_fit_is_passed_over() -> None:
    world = served({"tiny": profile("1Gi"), "b": profile()})
    plan = world.plan()
    assert (plan.profile, plan.fits.holds) == ("b", True)
    alone = served({"tiny": profile("1Gi")})
    assert (alone.plan().profile, alone.plan().fits.holds) == ("tiny", False)


def test_a_wait_that_cannot_be_read_is_refused_by_name() -> None:
    world = World(
        manifest=manifest({"resources": None, "profile": "a"}),
        settings=parse_settings({"profiles": {"a": profile(fallbackAfter="soon")}}),
    )
    plan = world.plan()
    assert plan.accepted.holds is False
    assert "fallbackAfter: 'soon' is not a duration" in plan.accepted.message
