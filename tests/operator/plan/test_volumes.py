"""The volume of a model: made, grown, let go, and what is said where it cannot be had."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from plan_world import CLAIM, CLUSTER, GIB, JOB_NAME, World, described, downloading, manifest, pending, says

from quire_contract import model_facts
from quire_operator.plan.actions import Apply, Delete
from quire_operator.plan.cache.claim_differences import requested_bytes
from quire_operator.plan.cache.volumes import AUTO_SIZE_BYTES


def test_no_default_storage_class() -> None:
    cluster = replace(CLUSTER, has_default_storage_class=False)
    world = World(cluster=cluster)
    assert says(world)[0] == "NoDefaultStorageClass"
    world.settle()
    pending(world, storageClassName=None)
    reason, message = says(world)
    assert reason == "NoDefaultStorageClass"
    assert "spec.cache.storageClassName" in message
    assert world.plan().requeue_after_s == 30
    named = World(manifest=manifest({"cache": {"storageClassName": "slow"}}), cluster=cluster)
    assert says(named)[0] == "VolumePending"


def test_a_lost_volume_is_said() -> None:
    world = downloading()
    volume = copy.deepcopy(world.observed.volume)
    assert volume is not None
    volume["status"] = {"phase": "Lost"}
    world.see(volume=volume)
    assert says(world)[0] == "VolumeLost"


def test_a_volume_that_is_being_deleted_is_let_go() -> None:
    world = downloading()
    volume = copy.deepcopy(world.observed.volume)
    assert volume is not None
    volume["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    world.see(volume=volume)
    plan = world.plan()
    assert plan.model_cached.reason == "VolumePending"
    assert described(plan.actions) == [f"Delete Job/{JOB_NAME}"]
    world.settle()
    world.see(volume=None)
    assert described(world.plan().actions)[:2] == [f"Apply PersistentVolumeClaim/{CLAIM}", f"Apply Job/{JOB_NAME}"]


def test_a_model_in_a_volume_that_is_being_deleted_is_not_cached_and_serves_on() -> None:
    world = World()
    world.download()
    volume = copy.deepcopy(world.observed.volume)
    assert volume is not None
    volume["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    world.see(volume=volume)
    before = world.workload()
    reason, message = says(world)
    assert reason == "VolumePending"
    assert "is being deleted" in message
    world.set_spec(engine={"maxModelLen": 2048})
    world.settle()
    assert world.workload() == before
    world.add_pod()
    reason, message = says(world)
    assert reason == "VolumeDeleted", "it is not gone while a pod mounts it, which nobody would see otherwise"
    assert message == (
        f"PersistentVolumeClaim {CLAIM} is being deleted, and goes when no pod uses it; set spec.suspend to true until"
        " it is gone: a new one is made when it is gone."
    )


def test_auto_grows_once_for_each_pod_that_had_no_space() -> None:
    world = downloading()
    assert world.observed.volume is not None
    assert requested_bytes(world.observed.volume) == AUTO_SIZE_BYTES
    world.fail_job_pod(model_facts.NO_SPACE, need_bytes=20 * GIB, have_bytes=15 * GIB)
    plan = world.step()
    assert plan.model_cached.reason == "VolumeGrowing"
    assert world.plan().actions == ()
    assert world.plan().model_cached.reason == "VolumeGrowing"
    size = requested_bytes(world.observed.volume)
    assert size == 24 * GIB  # (16 + 20 - 15) × 1.1, rounded up
    assert world.observed.volume["spec"]["storageClassName"] == "fast"
    world.fail_job_pod(model_facts.NO_SPACE)
    world.settle()
    assert requested_bytes(world.observed.volume) > size


def test_retries_while_a_volume_is_being_grown_do_not_grow_it_further() -> None:
    world = downloading()
    world.fail_job_pod(model_facts.NO_SPACE, need_bytes=20 * GIB, have_bytes=15 * GIB)
    world.settle()
    grown = copy.deepcopy(world.observed.volume)
    assert grown is not None
    grown["status"]["capacity"] = {"storage": "16Gi"}
    world.see(volume=grown)
    world.fail_job_pod(model_facts.NO_SPACE, need_bytes=20 * GIB, have_bytes=15 * GIB)
    world.settle()
    assert world.observed.volume is not None
    done = copy.deepcopy(world.observed.volume)
    done["status"]["capacity"] = {"storage": "24Gi"}
    world.see(volume=done)
    assert world.plan().actions == ()
    assert requested_bytes(done) == 24 * GIB


@pytest.mark.parametrize(
    ("spec", "classes", "cure"),
    [
        (None, frozenset(), "set spec.cache.size to 24Gi, and delete PersistentVolumeClaim"),
        ({"cache": {"size": "16Gi"}}, frozenset({"fast"}), "set spec.cache.size to 24Gi"),
    ],
)
def test_no_space_says_need_have_and_the_field(spec: dict[str, Any] | None, classes: frozenset[str], cure: str) -> None:
    world = downloading(spec, cluster=replace(CLUSTER, expandable_storage_classes=classes))
    world.fail_job_pod(model_facts.NO_SPACE, need_bytes=20 * GIB, have_bytes=15 * GIB)
    reason, message = says(world)
    assert reason == "NoSpace"
    assert message.startswith("needs 20.0 GiB, has 15.0 GiB free; ")
    assert cure in message
    assert world.plan().actions == ()


def test_a_larger_size_grows_and_a_smaller_one_does_nothing() -> None:
    world = downloading({"cache": {"size": "20Gi"}})
    world.set_spec(cache={"size": "10Gi"})
    assert world.plan().actions == ()
    world.set_spec(cache={"size": "30Gi"})
    (action,) = world.plan().actions
    assert isinstance(action, Apply)
    assert action.manifest["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "30Gi"}},
    }
    world.settle()
    assert world.observed.volume is not None
    assert requested_bytes(world.observed.volume) == 30 * GIB
    world.cluster = replace(CLUSTER, expandable_storage_classes=frozenset())
    world.set_spec(cache={"size": "40Gi"})
    assert world.plan().actions == ()


@pytest.mark.parametrize(
    ("cache", "changed"),
    [
        ({"storageClassName": "slow"}, "spec.cache.storageClassName"),
        ({"storageClassName": "fast", "accessMode": "ReadWriteMany"}, "spec.cache.accessMode"),
        ({"storageClassName": "fast", "size": "2Gi"}, "spec.cache.size"),
    ],
)
def test_a_claim_with_nothing_behind_it_is_made_anew_when_another_is_wanted(
    cache: dict[str, Any], changed: str
) -> None:
    world = World(manifest=manifest({"cache": {"storageClassName": "fast", "size": "4Gi"}}))
    world.settle()
    pending(world)
    world.set_spec(cache=cache)
    deleted = [action for action in world.plan().actions if isinstance(action, Delete)]
    assert {action.ref.kind.kind for action in deleted} == {"PersistentVolumeClaim", "Job"}
    assert changed in deleted[0].reason
    world.settle()
    assert world.observed.volume is not None
    assert world.observed.volume["spec"]["storageClassName"] == cache.get("storageClassName")


def test_a_claim_that_others_use_is_not_made_anew() -> None:
    world = World(manifest=manifest({"cache": {"storageClassName": "fast"}}))
    world.settle()
    pending(world)
    world.see(other_cache_users=frozenset({"n"}))
    world.set_spec(cache={"storageClassName": "slow"})
    assert not [action for action in world.plan().actions if isinstance(action, Delete)]
