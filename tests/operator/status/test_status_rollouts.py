"""The status while a changed spec reaches the pods, or does not."""

import pytest
from status_objects import (
    BACK_OFF,
    CRASH,
    DOWNLOADING,
    LATER,
    TIME,
    build_condition,
    build_manifest,
    build_observed,
    build_plan,
    build_pod,
    build_workload,
    check,
    derive,
    ended,
    pulling,
    refused_plan,
    rolled_out,
    shown_condition,
    unschedulable,
)

from quire_kube.objects import Manifest
from quire_operator.plan.actions import Verdict


def test_a_crash_after_the_rollout_does_not_undo_it() -> None:
    crashed = build_pod(state=BACK_OFF, lastState=ended(CRASH), restartCount=3)
    done = build_condition("Progressing", "True", "NewReplicaSetAvailable")
    status = derive(build_observed(crashed, workload=build_workload(done, replicas=1, updatedReplicas=1)))
    assert shown_condition(status, "RolloutComplete") == ("True", "Complete")
    assert shown_condition(status, "Ready") == ("False", "CrashLoop")
    assert shown_condition(status, "Loaded") == ("False", "CrashLoop")


@pytest.mark.parametrize(
    ("new", "reason", "line"),
    [
        (
            unschedulable("pod-b"),
            "RolloutBlocked",
            "RolloutBlocked: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu; free what it asks for, or set "
            "spec.rollout.strategy to Replace",
        ),
        (
            pulling("pod-b"),
            "RolloutFailed",
            "RolloutFailed: ImagePullBackOff: i: i: not found; the old pods go on serving",
        ),
        (
            build_pod("pod-b", state=BACK_OFF, lastState=ended(CRASH)),
            "RolloutFailed",
            "RolloutFailed: CrashLoop: ValueError: bad flag; the old pods go on serving",
        ),
        (build_pod("pod-b"), "Progressing", ""),
    ],
)
def test_a_rollout_beside_serving_pods(new: Manifest, reason: str, line: str) -> None:
    status = derive(build_observed(build_pod(revision="old", ready=True), new, workload=build_workload()))
    check(status)
    assert (status["phase"], status["reason"]) == ("Updating", line)
    assert shown_condition(status, "RolloutComplete") == ("False", reason)
    assert shown_condition(status, "Ready") == ("True", "Serving")
    assert (status["replicas"], status["readyReplicas"], status["pendingReplicas"]) == (2, 1, 1)


@pytest.mark.parametrize("has_old", [True, False])
def test_a_pod_that_finds_no_place_beside_its_volume_is_told_the_cure(has_old: bool) -> None:
    new = unschedulable("pod-b")
    (scheduled,) = new["status"]["conditions"]
    scheduled["message"] = "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match pod affinity rules."
    old = [build_pod(revision="old", ready=True)] if has_old else []
    status = derive(build_observed(*old, new, workload=build_workload()))
    (rollout,) = (condition for condition in status["conditions"] if condition["type"] == "RolloutComplete")
    assert rollout["reason"] == "RolloutBlocked"
    assert "spec.cache.accessMode ReadWriteMany" in rollout["message"]
    assert ("spec.rollout.strategy to Replace" in rollout["message"]) is has_old


def test_a_first_rollout_has_nothing_to_fall_back_to_and_names_the_cause_itself() -> None:
    crashed = build_pod("pod-b", state=BACK_OFF, lastState=ended(CRASH))
    observed = build_observed(build_pod(ready=True), crashed, workload=build_workload(replicas=2))
    status = derive(observed, build_plan(replicas=2))
    assert (status["phase"], status["reason"]) == ("Ready", "CrashLoop: ValueError: bad flag")
    assert shown_condition(status, "RolloutComplete") == ("False", "RolloutFailed")


def test_a_rollout_that_takes_too_long() -> None:
    late = build_workload(
        build_condition("Progressing", "False", "ProgressDeadlineExceeded", "ReplicaSet has timed out")
    )
    status = derive(build_observed(build_pod(revision="old", ready=True), build_pod("pod-b"), workload=late))
    assert shown_condition(status, "RolloutComplete") == ("False", "RolloutFailed")
    assert status["reason"].startswith("RolloutFailed: ProgressDeadlineExceeded")


def test_a_new_model_that_cannot_be_had_leaves_the_old_one_serving() -> None:
    plan = refused_plan("model_cached", "ModelNotFound", "hf://org/other is not there.")
    status = derive(
        build_observed(build_pod(revision="old", ready=True), workload=build_workload(revision="old")), plan
    )
    assert (status["phase"], status["reason"]) == (
        "Updating",
        "RolloutBlocked: ModelNotFound: hf://org/other is not there.",
    )
    assert shown_condition(status, "Ready") == ("True", "Serving")
    assert shown_condition(status, "RolloutComplete") == ("False", "RolloutBlocked")


def test_a_new_model_that_is_still_downloaded_is_nothing_wrong() -> None:
    observed = build_observed(
        build_pod(revision="old", ready=True), workload=build_workload(revision="old"), job_pods=(build_pod("job-pod"),)
    )
    status = derive(observed, build_plan(**DOWNLOADING))
    assert (status["phase"], status["reason"]) == ("Updating", "")
    assert shown_condition(status, "RolloutComplete") == ("False", "WaitingForModel")


def test_a_spec_that_is_refused_leaves_the_accepted_one_serving() -> None:
    before = derive(build_observed(build_pod(ready=True), workload=rolled_out()))
    manifest = build_manifest(status=before)
    manifest["metadata"]["generation"] = 4
    unknown = Verdict(holds=None, reason="Unknown", message="")
    plan = build_plan(
        accepted=Verdict(holds=False, reason="InvalidSpec", message="spec.profile: unknown"),
        model_cached=unknown,
        fits=unknown,
        facts=None,
        fit=None,
        revision=None,
        replicas=0,
    )
    status = derive(build_observed(build_pod(ready=True), workload=rolled_out(), manifest=manifest), plan, now=LATER)
    check(status)
    assert (status["phase"], status["reason"]) == ("Ready", "InvalidSpec: spec.profile: unknown")
    assert status["observedGeneration"] == 4
    generations = {c["type"]: c["observedGeneration"] for c in status["conditions"]}
    assert (generations["Accepted"], generations["Ready"], generations["ServiceReady"]) == (4, 3, 3)
    assert shown_condition(status, "Ready") == ("True", "Serving")
    assert shown_condition(status, "ModelCached") == ("True", "Yes")
    assert shown_condition(status, "RolloutComplete") == ("False", "NotAccepted")
    assert status["model"]["revision"] == "c0ffee"
    assert status["scaling"]["desired"] == 1


def test_waiting_for_idle_pods_is_dated_once() -> None:
    plan = build_plan(rollout_waiting=True)
    old = build_pod(revision="old", ready=True)
    first = derive(build_observed(old, workload=build_workload(revision="old")), plan)
    assert first["rolloutWaitingSince"] == TIME
    assert shown_condition(first, "RolloutComplete") == ("False", "WaitingForIdle")
    assert first["phase"] == "Updating"
    observed = build_observed(old, workload=build_workload(revision="old"), manifest=build_manifest(status=first))
    assert derive(observed, plan, now=LATER)["rolloutWaitingSince"] == TIME
    assert "rolloutWaitingSince" not in derive(observed, build_plan(), now=LATER)
