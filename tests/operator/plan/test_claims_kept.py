"""What becomes of a claim that is not as the spec says any more, that was left, or that nobody uses.

That a bound claim's class and access mode are immutable and that a claim never shrinks is Kubernetes' (validation of
PersistentVolumeClaimSpec), and so is that one which a pod mounts goes only when the pod is gone.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
from plan_world import CLAIM, CLUSTER, JOB_NAME, NOW, World, described, downloading, manifest, says

from quire_contract import names
from quire_kube.objects import Manifest
from quire_kube.times import format_time
from quire_operator.plan.actions import Annotate, Delete
from quire_operator.plan.cache.orphans import plan_orphans


def cached(cache: dict[str, Any] | None = None) -> World:
    world = World(manifest=manifest({"cache": cache}))
    world.download()
    return world


def told(world: World) -> tuple[str, str]:
    """What ModelCached says of a model that is there."""
    verdict = world.plan().model_cached
    assert verdict.holds is True
    return verdict.reason, verdict.message


def volume_of(world: World) -> Manifest:
    assert world.observed.volume is not None
    return world.observed.volume


def annotations(world: World) -> dict[str, str]:
    found: dict[str, str] = volume_of(world)["metadata"]["annotations"]
    return found


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (
            {"accessMode": "ReadWriteMany"},
            f"spec.cache.accessMode asks for ReadWriteMany, PersistentVolumeClaim {CLAIM}",
        ),
        ({"storageClassName": "slow"}, f"spec.cache.storageClassName asks for slow, PersistentVolumeClaim {CLAIM}"),
        ({"size": "10Gi"}, "spec.cache.size asks for 10.0 GiB"),
    ],
)
def test_a_bound_claim_that_is_not_as_asked_is_said_with_the_steps(cache: dict[str, Any], said: str) -> None:
    world = cached({"size": "20Gi"})
    assert told(world)[0] == "Cached"
    world.set_spec(cache={"size": "20Gi", **cache})
    reason, message = told(world)
    assert (reason, message.count(said)) == ("ClaimDiffers", 1)
    assert f"set spec.suspend to true, delete PersistentVolumeClaim {CLAIM}, and set spec.suspend to false" in message
    assert not any("Claim" in text for text in described(world.plan().actions))
    world.set_spec(cache={"size": "20Gi"})
    assert told(world)[0] == "Cached"


def test_a_class_that_cannot_grow_a_volume_is_said_with_the_steps() -> None:
    """`allowVolumeExpansion` of the StorageClass: without it an API server forbids the larger request."""
    world = cached({"size": "20Gi"})
    world.cluster = replace(CLUSTER, expandable_storage_classes=frozenset())
    world.set_spec(cache={"size": "30Gi"})
    reason, message = told(world)
    assert reason == "ClaimDiffers"
    assert f"StorageClass fast does not expand volumes: {CLAIM} stays at 20.0 GiB. To have it as asked" in message
    assert world.plan().actions == ()


def test_it_is_said_while_the_model_is_downloaded_too() -> None:
    world = downloading({"cache": {"accessMode": "ReadWriteOnce"}})
    world.add_job_pod("Running")
    world.set_spec(cache={"accessMode": "ReadWriteMany"})
    reason, message = says(world)
    assert reason == "Downloading"
    assert "spec.cache.accessMode asks for ReadWriteMany" in message


def test_the_steps_bring_the_wanted_claim() -> None:
    world = cached()
    world.set_spec(cache={"accessMode": "ReadWriteMany"}, suspend=True)
    world.settle()
    ending = copy.deepcopy(volume_of(world))
    ending["metadata"]["deletionTimestamp"] = format_time(NOW)
    world.see(volume=ending)
    world.settle()
    world.see(volume=None)
    world.set_spec(suspend=False)
    world.settle()
    assert volume_of(world)["spec"]["accessModes"] == ["ReadWriteMany"]
    assert says(world)[0] == "Downloading"


def test_others_who_use_the_claim_are_named_and_may_want_more() -> None:
    world = cached({"size": "20Gi"})
    world.see(other_cache_users=frozenset({"zoe", "bob"}))
    world.set_spec(cache={"size": "10Gi"})
    assert told(world)[0] == "Cached"
    world.set_spec(cache={"accessMode": "ReadWriteMany"})
    assert "(and of bob, zoe, which use it too)" in told(world)[1]


def test_a_user_who_asks_for_another_class_does_not_change_the_shared_volume() -> None:
    world = downloading()
    world.set_spec(cache={"storageClassName": "other", "accessMode": "ReadWriteMany"})
    assert not any("Claim" in text for text in described(world.plan().actions))


def test_the_wish_not_to_retain_is_left_on_the_volume() -> None:
    world = downloading({"cache": {"retain": False}})
    assert world.observed.volume is not None
    assert world.observed.volume["metadata"]["annotations"][names.ANNOTATION_RETAIN] == "false"
    world.set_spec(cache={"retain": True})
    world.see(other_cache_users=frozenset({"other"}))
    world.settle()
    assert world.observed.volume["metadata"]["annotations"][names.ANNOTATION_RETAIN] == "true"
    world.set_spec(cache={"retain": False})
    assert world.plan().actions == ()


def test_orphans() -> None:
    world = downloading({"cache": {"retain": False}})
    volume, job = world.observed.volume, world.observed.job
    assert volume is not None
    assert job is not None
    actions = plan_orphans([volume], [job], NOW)
    assert described(actions) == [f"Delete Job/{JOB_NAME}", f"Delete PersistentVolumeClaim/{CLAIM}"]
    assert all(isinstance(action, Delete) for action in actions)
    kept = downloading().observed.volume
    assert kept is not None
    (noted,) = plan_orphans([kept], [], NOW)
    assert isinstance(noted, Annotate)
    assert noted.annotations == {names.ANNOTATION_UNUSED_SINCE: format_time(NOW)}
    kept["metadata"]["annotations"] |= noted.annotations
    assert plan_orphans([kept], [], NOW + 60) == ()
    theirs = copy.deepcopy(volume)
    theirs["metadata"]["name"] = "mine"
    unlabelled = copy.deepcopy(volume)
    del unlabelled["metadata"]["labels"][names.LABEL_MANAGED_BY]
    ending = copy.deepcopy(volume)
    ending["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    assert plan_orphans([theirs, unlabelled, ending], [], NOW) == ()


def test_a_volume_that_is_used_again_is_unused_no_longer() -> None:
    world = cached()
    (noted,) = plan_orphans([volume_of(world)], [], NOW)
    world.carry_out(noted)
    assert annotations(world)[names.ANNOTATION_UNUSED_SINCE] == format_time(NOW)
    world.settle()
    assert not annotations(world)[names.ANNOTATION_UNUSED_SINCE]
    assert annotations(world)[names.ANNOTATION_MODEL_URI] == "hf://a/b"


@pytest.mark.parametrize("retain", [True, False])
def test_the_volume_of_the_model_before_gets_the_last_word_of_its_last_user(retain: bool) -> None:
    left = copy.deepcopy(volume_of(cached()))
    world = World(manifest=manifest({"model": {"uri": "hf://other/model"}, "cache": {"retain": retain}}))
    world.see(left_volume=left)
    written = [dict(action.annotations) for action in world.plan().actions if isinstance(action, Annotate)]
    assert written == ([] if retain else [{names.ANNOTATION_RETAIN: "false"}])
    left["metadata"]["labels"] = {}
    assert not [action for action in world.plan().actions if isinstance(action, Annotate)], "a person's claim"
