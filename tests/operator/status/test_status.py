"""The whole status: from realistic objects to phase, reason and conditions."""

from dataclasses import replace

import pytest
from status_objects import (
    BACK_OFF,
    CRASH,
    DOWNLOADING,
    LATER,
    TIME,
    TOO_BIG,
    build_condition,
    build_manifest,
    build_observed,
    build_plan,
    build_pod,
    build_workload,
    check,
    derive,
    ended,
    ending,
    look,
    pulling,
    refused_plan,
    rolled_out,
    shown_condition,
    unschedulable,
)

from quire_contract.model_facts import DownloadProgress
from quire_contract.phases import Phase, Readiness
from quire_kube.objects import Manifest
from quire_operator.plan.actions import Plan
from quire_operator.status.conditions import CONDITION_TYPES, find_condition
from quire_operator.status.status import MAX_COLUMN_LENGTH
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed


def test_a_model_that_is_served() -> None:
    status = derive(build_observed(build_pod(ready=True), workload=rolled_out()))
    check(status)
    assert (status["phase"], status["reason"]) == ("Ready", "")
    assert [condition["type"] for condition in status["conditions"]] == list(CONDITION_TYPES)
    not_true = {c["type"] for c in status["conditions"] if c["status"] != "True"}
    assert not_true == {"AutoscalingActive"}
    assert {c["observedGeneration"] for c in status["conditions"]} == {3}
    assert (status["replicas"], status["readyReplicas"], status["pendingReplicas"]) == (1, 1, 0)
    assert status["endpoint"] == "http://smollm2.ai.svc/v1"
    assert "quire.dev/deployment=smollm2" in status["selector"]
    assert status["model"] == {"bytes": 1 << 30, "revision": "c0ffee"}
    assert status["fit"]["kvCapacityTokens"] == 4
    assert status["scaling"]["desired"] == 1


def test_the_first_write_has_the_selector_and_every_condition() -> None:
    status = derive(Observed(manifest=build_manifest()), build_plan(**DOWNLOADING))
    check(status)
    assert status["selector"]
    assert status["replicas"] == 0
    assert len(status["conditions"]) == len(CONDITION_TYPES)
    assert status["phase"] == "Pending"


@pytest.mark.parametrize(
    ("progress", "reason"),
    [
        (None, "Downloading"),
        (
            DownloadProgress(done_bytes=42, total_bytes=100, bytes_per_second=31e6, eta_seconds=120),
            "Downloading: 42 % at 31 MB/s, 2 min left",
        ),
        (DownloadProgress(done_bytes=3 << 29), "Downloading: 1.5 GiB"),
        (
            DownloadProgress(done_bytes=10, total_bytes=10, message="verifying"),
            "Downloading: 100 %; verifying",
        ),
    ],
)
def test_a_running_download(progress: DownloadProgress | None, reason: str) -> None:
    observed = build_observed(job_pods=(build_pod("job-pod"),), progress=progress)
    assert look(observed, build_plan(**DOWNLOADING)) == ("Downloading", reason, ("False", "Downloading"))
    download = derive(observed, build_plan(**DOWNLOADING)).get("model", {}).get("download", {})
    assert download.get("doneBytes") == (progress and progress.done_bytes)


@pytest.mark.parametrize(
    ("readiness", "reason"),
    [
        (None, "Loading: the server is starting"),
        (Readiness(phase=Phase.LOADING, percent=63.2), "Loading: 63 %"),
        (Readiness(phase=Phase.LOADING, percent=63.2, eta_seconds=20), "Loading: 63 %, 20 s left"),
        (Readiness(phase=Phase.WARMING_UP, message="batch 8"), "WarmingUp: batch 8"),
    ],
)
def test_a_server_that_loads(readiness: Readiness | None, reason: str) -> None:
    said = {} if readiness is None else {"pod-a": readiness}
    observed = build_observed(build_pod(), workload=build_workload(), readiness=said)
    assert look(observed) == ("Loading", reason, ("False", "Loading"))


@pytest.mark.parametrize(
    ("plan", "phase", "reason"),
    [
        (
            refused_plan("accepted", "InvalidSpec", "spec.engine.extraArgs: --dtype must be one of auto, bfloat16"),
            "Failed",
            "InvalidSpec: spec.engine.extraArgs: --dtype must be one of auto, bfloat16",
        ),
        (
            refused_plan("model_cached", "ModelGated", "hf://org/model needs a token. Set spec.model.tokenSecretRef."),
            "Failed",
            "ModelGated: set spec.model.tokenSecretRef",
        ),
        (
            refused_plan("model_cached", "NoSpace", "needs 20.0 GiB, has 16.0 GiB free; set spec.cache.size to 22Gi"),
            "Failed",
            "NoSpace: needs 20.0 GiB, has 16.0 GiB free; set spec.cache.size to 22Gi",
        ),
        (
            refused_plan("model_cached", "SourceUnreachable", "The hub does not answer. It is tried again."),
            "Pending",
            "SourceUnreachable: The hub does not answer. It is tried again.",
        ),
        (
            refused_plan("model_cached", "VolumePending", "PersistentVolumeClaim c is not bound yet."),
            "Pending",
            "VolumePending: PersistentVolumeClaim c is not bound yet.",
        ),
        (
            refused_plan("fits", "OutOfMemory", "needs 17.1 GiB, has 15.0 GiB; engine.maxModelLen 4096 would fit"),
            "Failed",
            "OutOfMemory: needs 17.1 GiB, has 15.0 GiB; engine.maxModelLen 4096 would fit",
        ),
    ],
)
def test_what_keeps_pods_from_being_made(plan: Plan, phase: str, reason: str) -> None:
    shown = look(build_observed(), plan)
    assert shown[:2] == (phase, reason)
    assert shown[2][0] == "False"


def test_a_column_is_cut_and_the_conditions_have_all_of_it() -> None:
    message = f"model.safetensors: the sha256 checksum is {'a' * 64}, the source says {'b' * 64}; {'c ' * 60}the end"
    plan = refused_plan("model_cached", "ChecksumMismatch", message)
    status = derive(build_observed(), plan)
    assert status["reason"].startswith("ChecksumMismatch: model.safetensors: the sha256 checksum is aaa")
    assert (len(status["reason"]), status["reason"][-1]) == (MAX_COLUMN_LENGTH, "…")
    assert find_condition(status, "ModelCached")["message"] == message
    assert find_condition(status, "Ready")["message"] == message


def test_a_token_that_is_refused_is_told_in_the_plan_s_words() -> None:
    plan = refused_plan("model_cached", "ModelGated", "The token in Secret hf, key token, may not read the model.")
    manifest = build_manifest({"model": {"uri": "hf://org/model", "tokenSecretRef": {"name": "hf"}}})
    assert look(build_observed(manifest=manifest), plan)[1] == (
        "ModelGated: The token in Secret hf, key token, may not read the model."
    )


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (unschedulable("job-pod"), "InsufficientGPU: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu"),
        (pulling("job-pod"), "ImagePullBackOff: i: i: not found"),
    ],
)
def test_a_download_that_cannot_start(pod: Manifest, reason: str) -> None:
    status = derive(build_observed(job_pods=(pod,)), build_plan(**DOWNLOADING))
    assert (status["phase"], status["reason"]) == ("Pending", reason)
    assert shown_condition(status, "ModelCached") == ("False", reason.partition(":")[0])


def test_no_default_storage_class() -> None:
    claim = {"metadata": {"name": "c"}, "spec": {}, "status": {"phase": "Pending"}}
    observed = build_observed(volume=claim)
    shown = look(observed, build_plan(**DOWNLOADING), cluster=ClusterFacts(has_default_storage_class=False))
    assert shown == (
        "Failed",
        "NoDefaultStorageClass: set spec.cache.storageClassName",
        ("False", "NoDefaultStorageClass"),
    )


@pytest.mark.parametrize(
    ("pod", "phase", "reason"),
    [
        (unschedulable(), "Pending", "InsufficientGPU: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu"),
        (pulling(), "Pending", "ImagePullBackOff: i: i: not found"),
        (
            build_pod(state=BACK_OFF, lastState=ended(CRASH), restartCount=2),
            "Failed",
            "CrashLoop: ValueError: bad flag",
        ),
        (build_pod(state=BACK_OFF, lastState=ended(TOO_BIG)), "Failed", "OutOfMemory: needs 17.1 GiB, has 15.0 GiB"),
        (
            build_pod(lastState=ended(reason="OOMKilled", exit_code=137), restartCount=1),
            "Loading",
            "OutOfMemory: killed at its limit of 2 GiB; raise resources.limits.memory",
        ),
    ],
)
def test_pods_that_do_not_come_up(pod: Manifest, phase: str, reason: str) -> None:
    word = reason.partition(":")[0]
    assert look(build_observed(pod, workload=build_workload())) == (phase, reason, ("False", word))


def test_a_restarted_pod_that_is_ready_again_leaves_only_a_note() -> None:
    pod = build_pod(ready=True, lastState=ended(reason="OOMKilled", exit_code=137), restartCount=1)
    status = derive(build_observed(pod, workload=rolled_out()))
    assert (status["phase"], status["reason"]) == ("Ready", "")
    (loaded,) = (c for c in status["conditions"] if c["type"] == "Loaded")
    assert (loaded["status"], loaded["reason"]) == ("True", "Restarted")
    assert loaded["message"] == (
        "pod-a was restarted once, last for OutOfMemory: killed at its limit of 2 GiB; raise resources.limits.memory"
    )


def test_a_server_that_was_ready_and_does_not_answer() -> None:
    reason = "Unready: the server was ready, and does not answer now"
    assert look(build_observed(build_pod(started=True), workload=rolled_out()))[:2] == ("Loading", reason)


def test_a_pod_whose_image_is_pulled() -> None:
    pod = build_pod(state={"waiting": {"reason": "ContainerCreating"}})
    reason = "Pending: A pod has a node; its image is pulled or its volume mounted"
    assert look(build_observed(pod, workload=build_workload())) == ("Pending", reason, ("False", "Pending"))


CURE = "lower spec.resources, free some of it, or have the quota raised"


def test_a_quota_that_stops_more_replicas_undoes_no_rollout() -> None:
    progress = build_condition("Progressing", "True", "NewReplicaSetAvailable")
    failure = build_condition("ReplicaFailure", "True", "FailedCreate", "exceeded quota: gpu")
    observed = build_observed(build_pod(ready=True), workload=build_workload(progress, failure, replicas=2))
    status = derive(observed, build_plan(replicas=2))
    assert (status["phase"], status["reason"]) == ("Ready", f"QuotaExceeded: exceeded quota: gpu; {CURE}")
    assert shown_condition(status, "RolloutComplete")[0] == "True"
    surge = build_observed(build_pod(revision="old", ready=True), workload=build_workload(failure))
    status = derive(surge)
    reason = f"RolloutBlocked: QuotaExceeded: exceeded quota: gpu; {CURE}"
    assert (status["phase"], status["reason"]) == ("Updating", reason)


def test_a_quota() -> None:
    message = 'pods "smollm2-1-2" is forbidden: exceeded quota: gpu, requested: pods=1, used: pods=4, limited: pods=4'
    workload = build_workload(build_condition("ReplicaFailure", "True", "FailedCreate", message))
    shown = look(build_observed(workload=workload))
    assert shown == (
        "Pending",
        "QuotaExceeded: exceeded quota: gpu, requested: pods=1, used: pods=4, limited: pods=4; delete pods that nobody"
        " needs, or have the quota raised",
        ("False", "QuotaExceeded"),
    )


@pytest.mark.parametrize("given", [{"profile": "h100"}, {"profiles": ["h100", "l4"]}])
def test_the_cure_of_a_quota_is_not_a_field_that_a_profile_rules_out(given: dict[str, object]) -> None:
    """The CRD takes exactly one of resources, profile and profiles."""
    failure = build_condition("ReplicaFailure", "True", "FailedCreate", "exceeded quota: gpu")
    manifest = build_manifest()
    manifest["spec"] = {**manifest["spec"], **given}
    reason = look(build_observed(workload=build_workload(failure), manifest=manifest))[1]
    assert "; lower the server's resources in spec.podTemplate, free some of it" in reason
    assert "spec.resources" not in reason


def test_the_active_profile_is_dated() -> None:
    first = derive(build_observed(), build_plan(profile="h100"))
    assert first["activeProfile"] == {"name": "h100", "since": TIME}
    observed = build_observed(manifest=build_manifest(status=first))
    assert derive(observed, build_plan(profile="h100"), now=LATER)["activeProfile"]["since"] == TIME
    assert derive(observed, build_plan(profile="l40s"), now=LATER)["activeProfile"] == {
        "name": "l40s",
        "since": "2025-11-21T12:00:00Z",
    }


@pytest.mark.parametrize(
    ("pods", "phase"),
    [((), "Suspended"), ((ending(build_pod(ready=True)),), "Draining"), ((build_pod(ready=True),), "Draining")],
)
def test_suspended(pods: tuple[Manifest, ...], phase: str) -> None:
    observed = build_observed(*pods, workload=build_workload(replicas=0), manifest=build_manifest({"suspend": True}))
    for gateway in (False, True):
        status = derive(observed, build_plan(replicas=0), gateway=gateway)
        assert shown_condition(status, "ServiceReady")[0] == ("True" if status["readyReplicas"] else "False")
        shown = look(observed, build_plan(replicas=0), gateway=gateway)
        assert shown == (
            phase,
            "Suspended: spec.suspend is true; set it to false to serve",
            ("False", "Suspended"),
        )


def test_zero_replicas_are_ready_only_where_somebody_answers() -> None:
    observed, plan = build_observed(workload=rolled_out(replicas=0)), build_plan(replicas=0)
    phase, reason, ready = look(observed, plan)
    assert (phase, ready) == ("ScaledToZero", ("False", "ScaledToZero"))
    assert "set spec.replicas" in reason
    assert look(observed, plan, gateway=True) == ("ScaledToZero", "", ("True", "ScaledToZero"))
    draining = build_observed(ending(build_pod(ready=True)), workload=rolled_out(replicas=0))
    assert look(draining, plan, gateway=True) == ("Draining", "", ("True", "ScaledToZero"))


def test_zero_replicas_of_a_model_that_cannot_be_woken_are_not_ready() -> None:
    plan = replace(refused_plan("model_cached", "ModelNotFound", "hf://org/model is not there."), replicas=0)
    assert look(build_observed(), plan, gateway=True)[2] == ("False", "ModelNotFound")


def test_one_replica_of_two_without_a_node_is_ready_and_says_so() -> None:
    observed = build_observed(build_pod(ready=True), unschedulable("pod-b"), workload=rolled_out(replicas=2))
    phase, reason, ready = look(observed, build_plan(replicas=2))
    assert (phase, ready) == ("Ready", ("True", "Serving"))
    assert reason == "InsufficientGPU: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu"


def test_one_replica_of_two_that_loads_is_nothing_wrong() -> None:
    observed = build_observed(build_pod(ready=True), build_pod("pod-b"), workload=rolled_out(replicas=2))
    status = derive(observed, build_plan(replicas=2))
    assert (status["phase"], status["reason"], status["pendingReplicas"]) == ("Ready", "", 1)
    assert shown_condition(status, "Loaded") == ("False", "Loading")


def test_evicted_pods_are_no_replicas_and_tell_only_where_nothing_replaced_them() -> None:
    evicted = build_pod("pod-a")
    evicted["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    assert look(build_observed(evicted, build_pod("pod-b", ready=True), workload=rolled_out()))[:2] == ("Ready", "")
    status = derive(build_observed(evicted, workload=build_workload()))
    assert (status["replicas"], status["reason"]) == (0, "Evicted: The node was low on resource: memory.")


def test_workers_of_a_group_are_not_counted_but_their_troubles_are() -> None:
    leader, worker = build_pod("pod-0", ready=False), unschedulable("pod-0-1")
    for pod, index in ((leader, "0"), (worker, "1")):
        pod["metadata"]["labels"]["leaderworkerset.sigs.k8s.io/worker-index"] = index
    status = derive(build_observed(leader, worker, workload=build_workload()))
    assert status["replicas"] == 1
    assert status["reason"].startswith("InsufficientGPU")


def test_ready_pods_without_a_service_do_not_answer() -> None:
    observed = replace(build_observed(build_pod(ready=True), workload=rolled_out()), children={})
    assert look(observed)[2] == ("False", "ServiceMissing")


def test_a_transition_is_dated_when_it_happens() -> None:
    loading = derive(build_observed(build_pod(), workload=build_workload()))
    observed = build_observed(build_pod(ready=True), workload=rolled_out(), manifest=build_manifest(status=loading))
    ready = derive(observed, now=LATER)
    times = {c["type"]: c["lastTransitionTime"] for c in ready["conditions"]}
    assert times["Ready"] == times["Loaded"] == "2025-11-21T12:00:00Z"
    assert times["Accepted"] == times["Scheduled"] == TIME
