"""The download Job: what is wrong with it, what is said of it, and what is tried again when. See `test_volumes.py`."""

import copy
from typing import Any

import pytest
from plan_world import (
    CLAIM,
    FACTS,
    GIB,
    JOB_NAME,
    World,
    attempt,
    condition,
    described,
    downloading,
    manifest,
    pending,
    says,
    served,
)

from quire_contract import model_facts, names
from quire_contract.model_facts import DownloadProgress, ModelFacts, encode_facts
from quire_operator.plan.actions import Annotate
from quire_operator.watch.observed import WarningEvent

FACTS_ANNOTATION = names.ANNOTATION_FACTS_PREFIX + names.model_digest("hf://a/b", None)


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
        (
            {"exitCode": 137, "reason": "OOMKilled"},
            "memory. Raise spec.download.resources.limits.memory.",
        ),
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
        (
            {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'},
            "SecretMissing",
            "spec.download",
        ),
        (
            {"reason": "CreateContainerConfigError", "message": "couldn't find key secret in Secret ns/hf"},
            "SecretMissing",
            "create it, or correct spec.model.tokenSecretRef",
        ),
        (
            {"reason": "CreateContainerConfigError", "message": 'configmap "proxy" not found'},
            "ConfigMapMissing",
            "create it, or correct spec.download",
        ),
        ({"reason": "ImagePullBackOff", "message": "Back-off"}, "ImagePullBackOff", "Back-off"),
        ({"reason": "ErrImagePull", "message": "no such host"}, "ImagePullBackOff", "no such host"),
    ],
)
def test_a_pod_that_cannot_start(waiting: dict[str, str], reason: str, expected: str) -> None:
    world = downloading({"model": {"uri": "hf://a/b", "tokenSecretRef": {"name": "hf"}}})
    world.add_job_pod("Pending", waiting=waiting)
    found = says(world)
    assert found[0] == reason
    assert expected in found[1]


def test_a_job_that_a_queue_holds_back_says_so() -> None:
    """Kueue suspends a Job with its label until it admits it (Job.spec.suspend)."""
    world = downloading()
    job = copy.deepcopy(world.observed.job)
    assert job is not None
    job["spec"]["suspend"] = True
    world.see(job=job)
    assert says(world)[0] == "Downloading"
    assert "its Job is suspended" in says(world)[1]
    assert world.plan().actions == ()


def test_a_job_that_may_make_no_pod() -> None:
    world = downloading()
    said = 'Error creating: pods "quire-download-1-x" is forbidden: '
    quota = "failed quota: small: must specify limits.ephemeral-storage for: download"
    for why, reason, cure in (
        (quota, "QuotaNeedsResources", "; set limits.ephemeral-storage in spec.download.resources"),
        ("someone's webhook", "DownloadForbidden", ""),
    ):
        refusal = WarningEvent(kind="Job", name=JOB_NAME, reason="FailedCreate", message=said + why, time=1.0)
        world.see(warnings=(refusal,))
        found, message = says(world)
        assert found == reason
        assert message.startswith(f"The download's pod is refused: {why}{cure}")


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


OLDER_FACTS = (
    '{"type":"ModelFacts","path":"b-1234","bytes":5,"shape":{"family":"llama","num_layers":2,"parameters":[]}}'
)
"""As a version before layers had kinds left them on the claim."""


def upgraded() -> World:
    """A model that serves, whose facts are of the operator's version before."""
    world = served()
    volume = copy.deepcopy(world.observed.volume)
    assert volume is not None
    volume["metadata"]["annotations"][FACTS_ANNOTATION] = OLDER_FACTS
    world.see(volume=volume)
    return world


def end_refresh(world: World, message: str) -> None:
    world.add_job_pod("Succeeded", message=message, exitCode=0)
    world.end_job("Complete")
    world.settle()


class TestFactsOfAnotherVersion:
    def test_are_read_anew_while_the_model_serves(self) -> None:
        world = upgraded()
        workload = world.workload()
        plan = world.step()
        assert described(plan.actions) == [f"Apply Job/{JOB_NAME}"]
        assert (plan.model_cached.holds, plan.model_cached.reason) == (True, "Cached")
        assert (plan.fits.holds, plan.fits.reason) == (None, "FactsOutdated")
        assert world.plan().actions == ()
        end_refresh(world, encode_facts(FACTS).decode())
        assert world.observed.job is None
        assert world.plan().fits.holds is True
        assert world.plan().facts == FACTS
        assert world.workload() == workload

    @pytest.mark.parametrize(
        "message",
        [encode_facts(ModelFacts(path="b-1234", bytes=5, shape_error="not known")).decode(), OLDER_FACTS],
        ids=["an unknown family", "a Job of another version"],
    )
    def test_are_not_read_again_and_again(self, message: str) -> None:
        world = upgraded()
        world.step()
        end_refresh(world, message)
        assert world.observed.job is None
        plan = world.plan()
        assert (plan.actions, plan.fits.reason) == ((), "ArchitectureUnknown")

    def test_a_failing_job_leaves_the_model_served_and_is_tried_ever_more_seldom(self) -> None:
        world = upgraded()
        workload = world.workload()
        world.step()
        for wait_s in (15, 30, 60):
            world.fail_job_pod(model_facts.SOURCE_UNREACHABLE)
            world.end_job("Failed")
            world.settle()
            world.now += wait_s - 1
            assert world.plan().actions == ()
            assert world.plan().requeue_after_s == 1
            world.now += 1
            assert described(world.step().actions) == [f"Delete Job/{JOB_NAME}"]
            assert described(world.step().actions) == [f"Apply Job/{JOB_NAME}"]
            plan = world.plan()
            assert (plan.model_cached.reason, plan.fits.reason) == ("Cached", "FactsOutdated")
        assert world.workload() == workload
