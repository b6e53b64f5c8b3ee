"""The volume and the download Job: what is wrong with them, what is said of it, and what is tried again when."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from plan_world import CLUSTER, FACTS, GIB, World, condition, described, manifest

from quire_contract import model_facts, names
from quire_contract.model_facts import DownloadProgress, encode_facts
from quire_operator.actions import Annotate, Apply, Delete
from quire_operator.observed import WarningEvent
from quire_operator.orphans import plan_orphans
from quire_operator.volumes import AUTO_SIZE_BYTES, requested_bytes

CLAIM = names.cache_pvc_name("hf://a/b")
JOB_NAME = names.download_job_name("hf://a/b", None, CLAIM)


def downloading(spec: dict[str, Any] | None = None, **world: Any) -> World:
    made = World(manifest=manifest(spec), **world)
    made.settle()
    return made


def says(world: World) -> tuple[str, str]:
    cached = world.plan().model_cached
    assert cached.holds is False
    return cached.reason, cached.message


def attempt(world: World) -> str:
    assert world.observed.job is not None
    text: str = world.observed.job["metadata"]["annotations"][names.ANNOTATION_ATTEMPT]
    return text


def pending(world: World, **spec: Any) -> None:
    volume = copy.deepcopy(world.observed.volume)
    assert volume is not None
    volume["status"] = {"phase": "Pending"}
    volume["spec"].update(spec)
    world.see(volume=volume)


def test_progress_is_said() -> None:
    world = downloading()
    assert says(world) == ("Downloading", "hf://a/b is being downloaded.")
    world.add_job_pod("Running")
    world.see(progress=DownloadProgress(done_bytes=3 * GIB, total_bytes=16 * GIB, message="verifying"))
    assert says(world) == ("Downloading", "hf://a/b: 3.0 GiB of 16.0 GiB; verifying")


def test_a_signature_is_not_said() -> None:
    world = downloading({"model": {"uri": "https://host/m.gguf?X-Amz-Signature=5ec2e7"}})
    assert says(world) == ("Downloading", "https://host/m.gguf is being downloaded.")


@pytest.mark.parametrize(
    ("code", "fields", "expected"),
    [
        (model_facts.MODEL_GATED, {}, "spec.model.tokenSecretRef"),
        (model_facts.MODEL_GATED, {"hint": "Ask for access."}, "It failed. Ask for access."),
        (model_facts.MODEL_NOT_FOUND, {"hint": "Check spec.model.uri."}, "It failed. Check spec.model.uri."),
        (model_facts.CHECKSUM_MISMATCH, {}, "It failed."),
        (model_facts.MODEL_INVALID, {}, "It failed."),
        (model_facts.SOURCE_UNREACHABLE, {}, "It failed. It is tried again."),
    ],
)
def test_a_failed_attempt_tells_its_reason_at_once(code: str, fields: dict[str, str], expected: str) -> None:
    world = downloading()
    world.fail_job_pod(code, **fields)
    reason, message = says(world)
    assert reason == code
    assert expected in message
    world.add_job_pod("Running")
    assert says(world)[0] == code  # until it has got further than the one that failed
    world.see(progress=DownloadProgress(done_bytes=1, total_bytes=9))
    assert says(world)[0] == "Downloading"


@pytest.mark.parametrize(
    ("terminated", "expected"),
    [
        ({"exitCode": 1, "message": "Traceback\nValueError: bad\n"}, "ValueError: bad"),
        ({"exitCode": 137, "reason": "OOMKilled"}, "killed for want of memory"),
        ({"exitCode": 3}, "exit code 3"),
    ],
)
def test_a_pod_that_says_nothing_of_ours(terminated: dict[str, Any], expected: str) -> None:
    world = downloading()
    world.add_job_pod("Failed", **terminated)
    reason, message = says(world)
    assert reason == model_facts.DOWNLOAD_FAILED
    assert expected in message


def test_an_old_jobs_pods_say_nothing_of_the_new_one() -> None:
    world = downloading()
    pod = world.fail_job_pod(model_facts.MODEL_GATED)
    pod["metadata"]["ownerReferences"] = [{"kind": "Job", "uid": "an older one"}]
    assert says(world)[0] == "Downloading"


@pytest.mark.parametrize(
    ("waiting", "reason", "expected"),
    [
        ({"reason": "CreateContainerConfigError", "message": 'secret "hf" not found'}, "SecretMissing", "create it"),
        ({"reason": "ImagePullBackOff", "message": "Back-off"}, "ImagePullBackOff", "Back-off"),
        ({"reason": "ErrImagePull", "message": "no such host"}, "ImagePullBackOff", "no such host"),
    ],
)
def test_a_pod_that_cannot_start(waiting: dict[str, str], reason: str, expected: str) -> None:
    world = downloading()
    world.add_job_pod("Pending", waiting=waiting)
    found = says(world)
    assert found[0] == reason
    assert expected in found[1]


def test_a_job_that_may_make_no_pod() -> None:
    world = downloading()
    refusal = WarningEvent(kind="Job", name=JOB_NAME, reason="FailedCreate", message="exceeded quota", time=1.0)
    world.see(warnings=(refusal,))
    assert says(world) == ("DownloadForbidden", "The download's pod is refused: exceeded quota")


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


def test_a_volume_that_is_not_bound_is_the_reason_that_a_pod_finds_no_node() -> None:
    world = downloading()
    pending(world)
    pod = world.add_job_pod("Pending")
    pod["status"]["conditions"] = [condition("PodScheduled", "False", at=1.0, reason="Unschedulable", message="pvc")]
    world.see(
        warnings=(
            WarningEvent(kind="PersistentVolumeClaim", name=CLAIM, reason="ProvisioningFailed", message="no", time=1.0),
        )
    )
    assert says(world) == ("VolumePending", f"PersistentVolumeClaim {CLAIM} is not bound: no")
    bound = downloading()
    bound.see(job_pods=(pod,), job=world.observed.job)
    assert says(bound)[0] == "DownloadUnschedulable"


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


def test_a_user_who_asks_for_another_class_does_not_change_the_shared_volume() -> None:
    world = downloading()
    world.set_spec(cache={"storageClassName": "other", "accessMode": "ReadWriteMany"})
    assert not any("Claim" in text for text in described(world.plan().actions))


def test_a_failed_job_is_made_again_later_each_time() -> None:
    world = downloading()
    for number, wait_s in (("1", 15), ("2", 30), ("3", 60)):
        assert attempt(world) == number
        world.fail_job_pod(model_facts.SOURCE_UNREACHABLE)
        world.end_job("Failed")
        plan = world.settle()
        assert (plan.actions, plan.requeue_after_s) == ((), wait_s)
        assert plan.model_cached.reason == model_facts.SOURCE_UNREACHABLE
        world.now += wait_s
        world.settle()
    assert attempt(world) == "4"
    live = copy.deepcopy(world.observed.job)
    assert live is not None
    live["metadata"]["annotations"][names.ANNOTATION_ATTEMPT] = "40"
    world.see(job=live)
    world.end_job("Failed")
    assert world.plan().requeue_after_s == 300


def test_a_download_that_succeeds_forgets_the_tries_before_it() -> None:
    world = downloading()
    world.end_job("Failed")
    world.now += 15
    world.settle()
    assert attempt(world) == "2"
    world.download()
    assert world.observed.volume is not None
    lost = copy.deepcopy(world.observed.volume)
    del lost["metadata"]["annotations"][names.ANNOTATION_FACTS_PREFIX + names.model_digest("hf://a/b")]
    world.see(volume=lost)
    world.settle()
    assert attempt(world) == "1"


def test_a_corrected_spec_is_tried_at_once() -> None:
    world = downloading()
    world.fail_job_pod(model_facts.MODEL_GATED)
    world.end_job("Failed")
    world.settle()
    world.set_spec(model={"uri": "hf://a/b", "tokenSecretRef": {"name": "hf"}})
    assert described(world.plan().actions) == [f"Delete Job/{JOB_NAME}"]
    world.settle()
    assert attempt(world) == "1"
    assert says(world)[0] == "Downloading"


def test_two_users_of_a_model_do_not_take_turns() -> None:
    """One has a token and the other has none: the one that works prevails, and neither undoes the other at once."""
    world = downloading()
    world.see(other_cache_users=frozenset({"other"}))
    world.set_spec(model={"uri": "hf://a/b", "tokenSecretRef": {"name": "hf"}})
    assert world.plan().actions == ()
    world.fail_job_pod(model_facts.MODEL_GATED)
    assert (world.plan().actions, world.plan().requeue_after_s) == ((), 15)
    world.now += 15
    noted = f"Annotate PersistentVolumeClaim/{CLAIM}"
    assert described(world.plan().actions) == [noted, f"Delete Job/{JOB_NAME}"]
    world.settle()
    assert attempt(world) == "2"
    world.set_spec(model={"uri": "hf://a/b", "tokenSecretRef": {"name": "another"}})
    world.end_job("Failed")
    plan = world.settle()
    assert (plan.actions, plan.requeue_after_s) == ((), 30)


def test_a_job_that_ended_well_and_left_nothing_is_made_again() -> None:
    world = downloading()
    world.end_job("Complete")
    assert (world.plan().actions, world.plan().requeue_after_s) == ((), 10)
    world.now += 10
    world.settle()
    world.now += 5
    assert described(world.plan().actions) == [f"Delete Job/{JOB_NAME}"]
    assert says(world)[0] == "DownloadFailed"


def test_the_second_deployment_of_a_model_downloads_nothing() -> None:
    first = World()
    first.download()
    second = World()
    second.see(volume=first.observed.volume, other_cache_users=frozenset({"m"}))
    texts = described(second.plan().actions)
    assert "Apply Deployment/m" in texts
    assert not any("Job" in text or "Claim" in text for text in texts)


def test_unreadable_facts_are_found_again() -> None:
    world = downloading()
    volume = copy.deepcopy(world.observed.volume)
    assert volume is not None
    volume["metadata"]["annotations"][names.ANNOTATION_FACTS_PREFIX + names.model_digest("hf://a/b")] = "{"
    world.see(volume=volume, job=None)
    assert described(world.plan().actions) == [f"Apply Job/{JOB_NAME}"]


def test_facts_are_recorded_on_a_users_claim_and_nothing_else_is() -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "mine", "namespace": "ns", "uid": "uid-claim"},
        "spec": {"resources": {"requests": {"storage": "1Gi"}}, "storageClassName": "fast"},
        "status": {"phase": "Bound"},
    }
    world = World(manifest=manifest({"model": {"uri": "pvc://mine/b"}, "cache": {"size": "50Gi", "retain": False}}))
    world.see(volume=claim)
    world.settle()
    assert world.observed.volume == claim
    world.fail_job_pod(model_facts.NO_SPACE, need_bytes=2 * GIB, have_bytes=GIB)
    assert "grow PersistentVolumeClaim mine to 3Gi" in says(world)[1]
    world.add_job_pod("Succeeded", message=encode_facts(FACTS).decode(), exitCode=0)
    on_claim = [a for a in world.plan().actions if isinstance(a, Annotate)]
    assert [list(action.annotations) for action in on_claim] == [
        [names.ANNOTATION_FACTS_PREFIX + names.model_digest("pvc://mine/b")]
    ]


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
    actions = plan_orphans([volume], [job])
    assert described(actions) == [f"Delete Job/{JOB_NAME}", f"Delete PersistentVolumeClaim/{CLAIM}"]
    assert all(isinstance(action, Delete) for action in actions)
    kept = downloading().observed.volume
    assert kept is not None
    assert plan_orphans([kept], []) == ()
    theirs = copy.deepcopy(volume)
    theirs["metadata"]["name"] = "mine"
    unlabelled = copy.deepcopy(volume)
    del unlabelled["metadata"]["labels"][names.LABEL_MANAGED_BY]
    ending = copy.deepcopy(volume)
    ending["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    assert plan_orphans([theirs, unlabelled, ending], []) == ()


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
