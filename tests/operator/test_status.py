"""The whole status: from realistic objects to phase, reason and conditions; and what holds for any objects."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quire_contract.crd import load_schema
from quire_contract.fit import FitReport
from quire_contract.model_facts import DownloadProgress, ModelFacts
from quire_contract.names import LABEL_REVISION
from quire_contract.phases import Phase, Readiness
from quire_contract.termination import TerminationMessage, encode_termination
from quire_operator.actions import Plan, Verdict
from quire_operator.cluster import ClusterFacts
from quire_operator.conditions import CONDITION_TYPES
from quire_operator.objects import DEPLOYMENT, SERVICE, Manifest, Ref
from quire_operator.observed import Observed, WarningEvent
from quire_operator.settings import Settings
from quire_operator.status import derive_status

NOW = 1_763_722_800.0
LATER = NOW + 3600.0
TIME = "2025-11-21T11:00:00Z"
NAME, NAMESPACE = "smollm2", "ai"
STATUS_SCHEMA = load_schema()["properties"]["status"]
FACTS = ModelFacts(path="hf/org/model", bytes=1 << 30, revision="c0ffee")
FIT = FitReport(
    fits=True,
    need_bytes=5,
    have_bytes=9,
    weights_bytes=3,
    workspace_bytes=1,
    kv_bytes_per_token=1,
    kv_capacity_tokens=4,
    max_concurrent_sequences=2,
    max_model_len=4,
)
YES = Verdict(holds=True, reason="Yes", message="It is so.")
GPU_MESSAGE = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


def _manifest(spec: dict[str, Any] | None = None, status: dict[str, Any] | None = None) -> Manifest:
    return {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": NAME, "namespace": NAMESPACE, "uid": "llm-uid", "generation": 3, "resourceVersion": "7"},
        "spec": {"model": {"uri": "hf://org/model"}} | (spec or {}),
        **({"status": status} if status is not None else {}),
    }


def _plan(**changes: Any) -> Plan:
    base = Plan(
        accepted=YES,
        model_cached=YES,
        fits=YES,
        autoscaling=Verdict(holds=False, reason="NoGateway", message="Replicas stay as spec.replicas says."),
        replicas=1,
        facts=FACTS,
        fit=FIT,
        revision="new",
    )
    return replace(base, **changes)


DOWNLOADING: Mapping[str, Any] = {
    "model_cached": Verdict(holds=False, reason="Downloading", message="hf://org/model is being downloaded."),
    "fits": Verdict(holds=None, reason="ModelUnknown", message="The model's files are not there yet."),
    "facts": None,
    "fit": None,
    "revision": None,
}


def _condition(type_: str, status: str, reason: str = "", message: str = "") -> dict[str, Any]:
    return {"type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": TIME}


def _pod(name: str = "pod-a", *, revision: str = "new", ready: bool = False, **container: Any) -> Manifest:
    """Build a pod whose server runs, unless `container` says otherwise."""
    state = {"running": {"startedAt": TIME}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": f"uid-{name}",
            "creationTimestamp": TIME,
            "labels": {LABEL_REVISION: revision},
        },
        "spec": {
            "nodeName": "node-1",
            "containers": [{"name": "server", "image": "i", "resources": {"limits": {"memory": "2Gi"}}}],
        },
        "status": {
            "phase": "Running",
            "conditions": [_condition("PodScheduled", "True"), _condition("Ready", "True" if ready else "False")],
            "containerStatuses": [
                {"name": "server", "image": "i", "ready": ready, "restartCount": 0, "state": state, "lastState": {}}
                | container
            ],
        },
    }


def _unschedulable(name: str = "pod-a", *, revision: str = "new") -> Manifest:
    pod = _pod(name, revision=revision)
    pod["spec"]["nodeName"] = None
    pod["status"] = {
        "phase": "Pending",
        "conditions": [_condition("PodScheduled", "False", "Unschedulable", GPU_MESSAGE)],
    }
    return pod


def _pulling(name: str = "pod-a", *, revision: str = "new") -> Manifest:
    message = 'Back-off pulling image "i": ErrImagePull: i: not found'
    pod = _pod(name, revision=revision, state={"waiting": {"reason": "ImagePullBackOff", "message": message}})
    pod["status"]["phase"] = "Pending"
    return pod


def _ending(pod: Manifest) -> Manifest:
    return {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": TIME}}


def _end(message: str = "", *, reason: str = "Error", exit_code: int = 1) -> dict[str, Any]:
    return {"terminated": {"exitCode": exit_code, "reason": reason, "message": message}}


def _workload(
    *conditions: dict[str, Any], revision: str = "new", replicas: int = 1, generation: int = 1, **status: Any
) -> Manifest:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": NAME,
            "namespace": NAMESPACE,
            "generation": generation,
            "labels": {LABEL_REVISION: revision},
        },
        "spec": {"replicas": replicas},
        "status": {"observedGeneration": generation, "conditions": list(conditions), **status},
    }


def _rolled_out(replicas: int = 1) -> Manifest:
    done = _condition("Progressing", "True", "NewReplicaSetAvailable")
    return _workload(done, replicas=replicas, updatedReplicas=replicas, readyReplicas=replicas)


def _service() -> Manifest:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME, "namespace": NAMESPACE}}


def _observed(
    *pods: Manifest, workload: Manifest | None = None, manifest: Manifest | None = None, **fields: Any
) -> Observed:
    children = {Ref(kind=SERVICE, namespace=NAMESPACE, name=NAME): _service()}
    if workload is not None:
        children[Ref(kind=DEPLOYMENT, namespace=NAMESPACE, name=NAME)] = workload
    return Observed(manifest=manifest or _manifest(), children=children, pods=pods, **fields)


def _derive(
    observed: Observed, plan: Plan | None = None, *, gateway: bool = False, now: float = NOW, cluster: Any = None
) -> dict[str, Any]:
    settings = Settings(routes_through_gateway=gateway)
    return derive_status(observed, plan or _plan(), cluster or ClusterFacts(), settings, now)


def _shown(status: Mapping[str, Any], type_: str) -> tuple[str, str]:
    (found,) = (condition for condition in status["conditions"] if condition["type"] == type_)
    return found["status"], found["reason"]


def _look(observed: Observed, plan: Plan | None = None, **options: Any) -> tuple[str, str, tuple[str, str]]:
    """Return phase, reason, and Ready."""
    status = _derive(observed, plan, **options)
    jsonschema.validate(status, STATUS_SCHEMA)
    return status["phase"], status["reason"], _shown(status, "Ready")


def test_a_model_that_is_served() -> None:
    status = _derive(_observed(_pod(ready=True), workload=_rolled_out()))
    jsonschema.validate(status, STATUS_SCHEMA)
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
    status = _derive(Observed(manifest=_manifest()), _plan(**DOWNLOADING))
    jsonschema.validate(status, STATUS_SCHEMA)
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
    observed = _observed(job_pods=(_pod("job-pod"),), progress=progress)
    assert _look(observed, _plan(**DOWNLOADING)) == ("Downloading", reason, ("False", "Downloading"))
    download = _derive(observed, _plan(**DOWNLOADING)).get("model", {}).get("download", {})
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
    observed = _observed(_pod(), workload=_workload(), readiness=said)
    assert _look(observed) == ("Loading", reason, ("False", "Loading"))


def _verdict(field: str, reason: str, message: str) -> Plan:
    changes = dict(DOWNLOADING) if field == "model_cached" else {"revision": None}
    return _plan(**{**changes, field: Verdict(holds=False, reason=reason, message=message)})


@pytest.mark.parametrize(
    ("plan", "phase", "reason"),
    [
        (
            _verdict("accepted", "InvalidSpec", "spec.engine.extraArgs: --dtype must be one of auto, bfloat16"),
            "Failed",
            "InvalidSpec: spec.engine.extraArgs: --dtype must be one of auto, bfloat16",
        ),
        (
            _verdict("model_cached", "ModelGated", "hf://org/model needs a token. Set spec.model.tokenSecretRef."),
            "Failed",
            "ModelGated: set spec.model.tokenSecretRef",
        ),
        (
            _verdict("model_cached", "NoSpace", "needs 20.0 GiB, has 16.0 GiB free; set spec.cache.size to 22Gi"),
            "Failed",
            "NoSpace: needs 20.0 GiB, has 16.0 GiB free; set spec.cache.size to 22Gi",
        ),
        (
            _verdict("model_cached", "SourceUnreachable", "The hub does not answer. It is tried again."),
            "Pending",
            "SourceUnreachable: The hub does not answer. It is tried again.",
        ),
        (
            _verdict("model_cached", "VolumePending", "PersistentVolumeClaim c is not bound yet."),
            "Pending",
            "VolumePending: PersistentVolumeClaim c is not bound yet.",
        ),
        (
            _verdict("fits", "OutOfMemory", "needs 17.1 GiB, has 15.0 GiB; engine.maxModelLen 4096 would fit"),
            "Failed",
            "OutOfMemory: needs 17.1 GiB, has 15.0 GiB; engine.maxModelLen 4096 would fit",
        ),
    ],
)
def test_what_keeps_pods_from_being_made(plan: Plan, phase: str, reason: str) -> None:
    shown = _look(_observed(), plan)
    assert shown[:2] == (phase, reason)
    assert shown[2][0] == "False"


def test_a_token_that_is_refused_is_told_in_the_plan_s_words() -> None:
    plan = _verdict("model_cached", "ModelGated", "The token in Secret hf, key token, may not read the model.")
    manifest = _manifest({"model": {"uri": "hf://org/model", "tokenSecretRef": {"name": "hf"}}})
    assert _look(_observed(manifest=manifest), plan)[1] == (
        "ModelGated: The token in Secret hf, key token, may not read the model."
    )


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (_unschedulable("job-pod"), "InsufficientGPU: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu"),
        (_pulling("job-pod"), "ImagePullBackOff: i: i: not found"),
    ],
)
def test_a_download_that_cannot_start(pod: Manifest, reason: str) -> None:
    status = _derive(_observed(job_pods=(pod,)), _plan(**DOWNLOADING))
    assert (status["phase"], status["reason"]) == ("Pending", reason)
    assert _shown(status, "ModelCached") == ("False", reason.partition(":")[0])


def test_no_default_storage_class() -> None:
    claim = {"metadata": {"name": "c"}, "spec": {}, "status": {"phase": "Pending"}}
    observed = _observed(volume=claim)
    shown = _look(observed, _plan(**DOWNLOADING), cluster=ClusterFacts(has_default_storage_class=False))
    assert shown == (
        "Failed",
        "NoDefaultStorageClass: set spec.cache.storageClassName",
        ("False", "NoDefaultStorageClass"),
    )


CRASH = "Traceback (most recent call last):\n  File x\nValueError: bad flag\n"
TOO_BIG = encode_termination(
    TerminationMessage(
        code="OutOfMemory", stage="Loading", message="", need_bytes=int(17.1 * 2**30), have_bytes=15 * 2**30
    )
).decode()
BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}}


@pytest.mark.parametrize(
    ("pod", "phase", "reason"),
    [
        (_unschedulable(), "Pending", "InsufficientGPU: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu"),
        (_pulling(), "Pending", "ImagePullBackOff: i: i: not found"),
        (_pod(state=BACK_OFF, lastState=_end(CRASH), restartCount=2), "Failed", "CrashLoop: ValueError: bad flag"),
        (_pod(state=BACK_OFF, lastState=_end(TOO_BIG)), "Failed", "OutOfMemory: needs 17.1 GiB, has 15.0 GiB"),
        (
            _pod(lastState=_end(reason="OOMKilled", exit_code=137), restartCount=1),
            "Loading",
            "OutOfMemory: killed at its limit of 2 GiB; raise resources.limits.memory",
        ),
    ],
)
def test_pods_that_do_not_come_up(pod: Manifest, phase: str, reason: str) -> None:
    word = reason.partition(":")[0]
    assert _look(_observed(pod, workload=_workload())) == (phase, reason, ("False", word))


def test_a_restarted_pod_that_is_ready_again_leaves_only_a_note() -> None:
    pod = _pod(ready=True, lastState=_end(reason="OOMKilled", exit_code=137), restartCount=1)
    status = _derive(_observed(pod, workload=_rolled_out()))
    assert (status["phase"], status["reason"]) == ("Ready", "")
    (loaded,) = (c for c in status["conditions"] if c["type"] == "Loaded")
    assert (loaded["status"], loaded["reason"]) == ("True", "Restarted")
    assert loaded["message"] == (
        "pod-a was restarted once, last for OutOfMemory: killed at its limit of 2 GiB; raise resources.limits.memory"
    )


def test_a_quota() -> None:
    message = 'pods "smollm2-1-2" is forbidden: exceeded quota: gpu, requested: pods=1, used: pods=4, limited: pods=4'
    workload = _workload(_condition("ReplicaFailure", "True", "FailedCreate", message))
    shown = _look(_observed(workload=workload))
    assert shown == (
        "Pending",
        "QuotaExceeded: exceeded quota: gpu, requested: pods=1, used: pods=4, limited: pods=4",
        ("False", "QuotaExceeded"),
    )


def test_a_crash_after_the_rollout_does_not_undo_it() -> None:
    crashed = _pod(state=BACK_OFF, lastState=_end(CRASH), restartCount=3)
    done = _condition("Progressing", "True", "NewReplicaSetAvailable")
    status = _derive(_observed(crashed, workload=_workload(done, replicas=1, updatedReplicas=1)))
    assert _shown(status, "RolloutComplete") == ("True", "Complete")
    assert _shown(status, "Ready") == ("False", "CrashLoop")
    assert _shown(status, "Loaded") == ("False", "CrashLoop")


@pytest.mark.parametrize(
    ("new", "reason", "line"),
    [
        (
            _unschedulable("pod-b"),
            "RolloutBlocked",
            "RolloutBlocked: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu; free what it asks for, or set "
            "spec.rollout.strategy to Replace",
        ),
        (
            _pulling("pod-b"),
            "RolloutFailed",
            "RolloutFailed: ImagePullBackOff: i: i: not found; the old pods go on serving",
        ),
        (
            _pod("pod-b", state=BACK_OFF, lastState=_end(CRASH)),
            "RolloutFailed",
            "RolloutFailed: CrashLoop: ValueError: bad flag; the old pods go on serving",
        ),
        (_pod("pod-b"), "Progressing", ""),
    ],
)
def test_a_rollout_beside_serving_pods(new: Manifest, reason: str, line: str) -> None:
    status = _derive(_observed(_pod(revision="old", ready=True), new, workload=_workload()))
    jsonschema.validate(status, STATUS_SCHEMA)
    assert (status["phase"], status["reason"]) == ("Updating", line)
    assert _shown(status, "RolloutComplete") == ("False", reason)
    assert _shown(status, "Ready") == ("True", "Serving")
    assert (status["replicas"], status["readyReplicas"], status["pendingReplicas"]) == (2, 1, 1)


def test_a_rollout_that_takes_too_long() -> None:
    late = _workload(_condition("Progressing", "False", "ProgressDeadlineExceeded", "ReplicaSet has timed out"))
    status = _derive(_observed(_pod(revision="old", ready=True), _pod("pod-b"), workload=late))
    assert _shown(status, "RolloutComplete") == ("False", "RolloutFailed")
    assert status["reason"].startswith("RolloutFailed: ProgressDeadlineExceeded")


def test_a_new_model_that_cannot_be_had_leaves_the_old_one_serving() -> None:
    plan = _verdict("model_cached", "ModelNotFound", "hf://org/other is not there.")
    status = _derive(_observed(_pod(revision="old", ready=True), workload=_workload(revision="old")), plan)
    assert (status["phase"], status["reason"]) == (
        "Updating",
        "RolloutBlocked: ModelNotFound: hf://org/other is not there.",
    )
    assert _shown(status, "Ready") == ("True", "Serving")
    assert _shown(status, "RolloutComplete") == ("False", "RolloutBlocked")


def test_a_new_model_that_is_still_downloaded_is_nothing_wrong() -> None:
    observed = _observed(
        _pod(revision="old", ready=True), workload=_workload(revision="old"), job_pods=(_pod("job-pod"),)
    )
    status = _derive(observed, _plan(**DOWNLOADING))
    assert (status["phase"], status["reason"]) == ("Updating", "")
    assert _shown(status, "RolloutComplete") == ("False", "WaitingForModel")


def test_a_spec_that_is_refused_leaves_the_accepted_one_serving() -> None:
    before = _derive(_observed(_pod(ready=True), workload=_rolled_out()))
    manifest = _manifest(status=before)
    manifest["metadata"]["generation"] = 4
    unknown = Verdict(holds=None, reason="Unknown", message="")
    plan = _plan(
        accepted=Verdict(holds=False, reason="InvalidSpec", message="spec.profile: unknown"),
        model_cached=unknown,
        fits=unknown,
        facts=None,
        fit=None,
        revision=None,
        replicas=0,
    )
    status = _derive(_observed(_pod(ready=True), workload=_rolled_out(), manifest=manifest), plan, now=LATER)
    jsonschema.validate(status, STATUS_SCHEMA)
    assert (status["phase"], status["reason"]) == ("Ready", "InvalidSpec: spec.profile: unknown")
    assert status["observedGeneration"] == 4
    generations = {c["type"]: c["observedGeneration"] for c in status["conditions"]}
    assert (generations["Accepted"], generations["Ready"], generations["ServiceReady"]) == (4, 3, 3)
    assert _shown(status, "Ready") == ("True", "Serving")
    assert _shown(status, "ModelCached") == ("True", "Yes")
    assert _shown(status, "RolloutComplete") == ("False", "NotAccepted")
    assert status["model"]["revision"] == "c0ffee"
    assert status["scaling"]["desired"] == 1


def test_waiting_for_idle_pods_is_dated_once() -> None:
    plan = _plan(rollout_waiting=True)
    old = _pod(revision="old", ready=True)
    first = _derive(_observed(old, workload=_workload(revision="old")), plan)
    assert first["rolloutWaitingSince"] == TIME
    assert _shown(first, "RolloutComplete") == ("False", "WaitingForIdle")
    assert first["phase"] == "Updating"
    observed = _observed(old, workload=_workload(revision="old"), manifest=_manifest(status=first))
    assert _derive(observed, plan, now=LATER)["rolloutWaitingSince"] == TIME
    assert "rolloutWaitingSince" not in _derive(observed, _plan(), now=LATER)


def test_the_active_profile_is_dated() -> None:
    first = _derive(_observed(), _plan(profile="h100"))
    assert first["activeProfile"] == {"name": "h100", "since": TIME}
    observed = _observed(manifest=_manifest(status=first))
    assert _derive(observed, _plan(profile="h100"), now=LATER)["activeProfile"]["since"] == TIME
    assert _derive(observed, _plan(profile="l40s"), now=LATER)["activeProfile"] == {
        "name": "l40s",
        "since": "2025-11-21T12:00:00Z",
    }


@pytest.mark.parametrize(
    ("pods", "phase"),
    [((), "Suspended"), ((_ending(_pod(ready=True)),), "Draining"), ((_pod(ready=True),), "Draining")],
)
def test_suspended(pods: tuple[Manifest, ...], phase: str) -> None:
    observed = _observed(*pods, workload=_workload(replicas=0), manifest=_manifest({"suspend": True}))
    for gateway in (False, True):
        shown = _look(observed, _plan(replicas=0), gateway=gateway)
        assert shown == (
            phase,
            "Suspended: spec.suspend is true; set it to false to serve",
            ("False", "Suspended"),
        )


def test_zero_replicas_are_ready_only_where_somebody_answers() -> None:
    observed, plan = _observed(workload=_rolled_out(replicas=0)), _plan(replicas=0)
    phase, reason, ready = _look(observed, plan)
    assert (phase, ready) == ("ScaledToZero", ("False", "ScaledToZero"))
    assert "set spec.replicas" in reason
    assert _look(observed, plan, gateway=True) == ("ScaledToZero", "", ("True", "ScaledToZero"))
    draining = _observed(_ending(_pod(ready=True)), workload=_rolled_out(replicas=0))
    assert _look(draining, plan, gateway=True) == ("Draining", "", ("True", "ScaledToZero"))


def test_zero_replicas_of_a_model_that_cannot_be_woken_are_not_ready() -> None:
    plan = replace(_verdict("model_cached", "ModelNotFound", "hf://org/model is not there."), replicas=0)
    assert _look(_observed(), plan, gateway=True)[2] == ("False", "ModelNotFound")


def test_one_replica_of_two_without_a_node_is_ready_and_says_so() -> None:
    observed = _observed(_pod(ready=True), _unschedulable("pod-b"), workload=_rolled_out(replicas=2))
    phase, reason, ready = _look(observed, _plan(replicas=2))
    assert (phase, ready) == ("Ready", ("True", "Serving"))
    assert reason == "InsufficientGPU: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu"


def test_one_replica_of_two_that_loads_is_nothing_wrong() -> None:
    observed = _observed(_pod(ready=True), _pod("pod-b"), workload=_rolled_out(replicas=2))
    status = _derive(observed, _plan(replicas=2))
    assert (status["phase"], status["reason"], status["pendingReplicas"]) == ("Ready", "", 1)
    assert _shown(status, "Loaded") == ("False", "Loading")


def test_evicted_pods_are_no_replicas_and_tell_only_where_nothing_replaced_them() -> None:
    evicted = _pod("pod-a")
    evicted["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    assert _look(_observed(evicted, _pod("pod-b", ready=True), workload=_rolled_out()))[:2] == ("Ready", "")
    status = _derive(_observed(evicted, workload=_workload()))
    assert (status["replicas"], status["reason"]) == (0, "Evicted: The node was low on resource: memory.")


def test_workers_of_a_group_are_not_counted_but_their_troubles_are() -> None:
    leader, worker = _pod("pod-0", ready=False), _unschedulable("pod-0-1")
    for pod, index in ((leader, "0"), (worker, "1")):
        pod["metadata"]["labels"]["leaderworkerset.sigs.k8s.io/worker-index"] = index
    status = _derive(_observed(leader, worker, workload=_workload()))
    assert status["replicas"] == 1
    assert status["reason"].startswith("InsufficientGPU")


def test_ready_pods_without_a_service_do_not_answer() -> None:
    observed = replace(_observed(_pod(ready=True), workload=_rolled_out()), children={})
    assert _look(observed)[2] == ("False", "ServiceMissing")


def test_a_transition_is_dated_when_it_happens() -> None:
    loading = _derive(_observed(_pod(), workload=_workload()))
    observed = _observed(_pod(ready=True), workload=_rolled_out(), manifest=_manifest(status=loading))
    ready = _derive(observed, now=LATER)
    times = {c["type"]: c["lastTransitionTime"] for c in ready["conditions"]}
    assert times["Ready"] == times["Loaded"] == "2025-11-21T12:00:00Z"
    assert times["Accepted"] == times["Scheduled"] == TIME


# What holds for anything that an API server may hold.

_words = st.sampled_from(
    ["", "Pending", "Failed", "OOMKilled", "CrashLoopBackOff", "ImagePullBackOff", "Running", "x y"]
)
_texts = st.one_of(_words, st.text(max_size=40), st.just(CRASH), st.just(TOO_BIG), st.just(GPU_MESSAGE))
_times = st.one_of(st.none(), st.just(TIME), st.just("2025-11-21T11:05:00Z"), st.just("nonsense"))
_counts = st.integers(0, 5)
_ends = st.fixed_dictionaries({}, optional={"exitCode": st.integers(0, 255), "reason": _words, "message": _texts})
_states = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"running": st.fixed_dictionaries({}, optional={"startedAt": _times})}),
    st.fixed_dictionaries({"waiting": st.fixed_dictionaries({}, optional={"reason": _words, "message": _texts})}),
    st.fixed_dictionaries({"terminated": _ends}),
)
_containers = st.fixed_dictionaries(
    {"name": st.sampled_from(["server", "sidecar"])},
    optional={"state": _states, "lastState": _states, "restartCount": _counts, "ready": st.booleans(), "image": _words},
)
_conditions = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["Ready", "PodScheduled", "Progressing", "ReplicaFailure", "Complete", "Failed"]),
            "status": st.sampled_from(["True", "False", "Unknown"]),
        },
        optional={
            "reason": st.sampled_from(["Unschedulable", "ProgressDeadlineExceeded", "NewReplicaSetAvailable", ""]),
            "message": _texts,
            "lastTransitionTime": _times,
        },
    ),
    max_size=4,
)


@st.composite
def _pods(draw: st.DrawFn) -> tuple[Manifest, ...]:
    pods = []
    for index in range(draw(st.integers(0, 3))):
        pod: Manifest = {
            "metadata": {
                "name": f"pod-{index}",
                "namespace": NAMESPACE,
                "uid": f"uid-{draw(st.integers(0, 3))}",
                "creationTimestamp": draw(_times),
                "labels": {LABEL_REVISION: draw(st.sampled_from(["new", "old"]))},
            },
            "spec": {"nodeName": draw(st.sampled_from(["", "node-1"])), "containers": [{"name": "server"}]},
            "status": {
                "phase": draw(st.sampled_from(["Pending", "Running", "Failed", "Succeeded", "Unknown"])),
                "conditions": draw(_conditions),
                "containerStatuses": draw(st.lists(_containers, max_size=2)),
                "initContainerStatuses": draw(st.lists(_containers, max_size=1)),
            },
        }
        if draw(st.booleans()):
            pod["metadata"]["deletionTimestamp"] = TIME
        if draw(st.booleans()):
            del pod["status"]
        pods.append(pod)
    return tuple(pods)


_verdicts = st.builds(
    Verdict,
    holds=st.sampled_from([True, False, None]),
    reason=st.sampled_from(["Yes", "Downloading", "NoSpace", "ModelGated", "VolumePending", "SecretMissing"]),
    message=_texts,
)
_progress = st.none() | st.builds(
    DownloadProgress,
    done_bytes=st.integers(0, 1 << 50),
    total_bytes=st.none() | st.integers(0, 1 << 50),
    bytes_per_second=st.none() | st.floats(0, 1e12),
    eta_seconds=st.none() | st.floats(0, 1e9),
    message=_texts,
)
_readiness = st.dictionaries(
    st.sampled_from(["pod-0", "pod-1"]),
    st.builds(Readiness, phase=st.sampled_from(Phase), percent=st.none() | st.floats(0, 100), message=_texts),
)
_warnings = st.lists(
    st.builds(
        WarningEvent,
        kind=st.sampled_from(["Pod", "Job", "PersistentVolumeClaim"]),
        name=st.sampled_from(["pod-0", "job", "claim"]),
        reason=st.sampled_from(["FailedMount", "FailedCreate", "ProvisioningFailed", "FailedBinding"]),
        message=_texts,
        time=st.floats(0, 1e9),
    ),
    max_size=3,
).map(tuple)


@st.composite
def _situations(draw: st.DrawFn) -> tuple[Observed, Plan, bool]:
    spec: dict[str, Any] = {"suspend": draw(st.booleans())}
    workload = None
    if draw(st.booleans()):
        workload = _workload(
            *draw(_conditions),
            revision=draw(st.sampled_from(["new", "old"])),
            replicas=draw(_counts),
            updatedReplicas=draw(_counts),
        )
    claim = {"metadata": {"name": "claim"}, "spec": {}, "status": {"phase": draw(st.sampled_from(["Pending", "Lost"]))}}
    job = {"metadata": {"name": "job"}, "status": {"startTime": draw(_times), "completionTime": draw(_times)}}
    observed = _observed(
        *draw(_pods()),
        workload=workload,
        manifest=_manifest(spec),
        volume=draw(st.sampled_from([None, claim])),
        job=draw(st.sampled_from([None, job])),
        job_pods=draw(_pods()),
        progress=draw(_progress),
        readiness=draw(_readiness),
        warnings=draw(_warnings),
    )
    plan = _plan(
        accepted=draw(_verdicts),
        model_cached=draw(_verdicts),
        fits=draw(_verdicts),
        autoscaling=draw(_verdicts),
        replicas=draw(_counts),
        profile=draw(st.sampled_from([None, "h100"])),
        revision=draw(st.sampled_from([None, "new"])),
        rollout_waiting=draw(st.booleans()),
    )
    return observed, plan, draw(st.booleans())


@given(_situations())
@hypothesis_settings(max_examples=150, deadline=None)
def test_any_status_is_valid_and_stable(case: tuple[Observed, Plan, bool]) -> None:
    observed, plan, gateway = case
    before = deepcopy(observed)
    status = _derive(observed, plan, gateway=gateway)
    jsonschema.validate(status, STATUS_SCHEMA)
    assert "\n" not in status["reason"]
    assert observed == before, "nothing observed is changed"
    again = replace(observed, manifest={**observed.manifest, "status": status})
    second = _derive(again, plan, gateway=gateway, now=LATER)
    assert second == status
    if status["reason"] == "":
        assert _shown(status, "Ready")[0] == "True"
