"""What holds of a status for anything that an API server may hold."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from status_objects import (
    CRASH,
    GPU_MESSAGE,
    LATER,
    NAME,
    NAMESPACE,
    NOW,
    TIME,
    TOO_BIG,
    build_manifest,
    build_observed,
    build_plan,
    build_workload,
    check,
    derive,
    shown_condition,
)

from quire_contract.model_facts import DownloadProgress
from quire_contract.names import LABEL_REVISION
from quire_contract.phases import Phase, Readiness
from quire_kube.objects import Manifest
from quire_operator.plan.actions import Plan, Verdict
from quire_operator.status.transitions import MAX_EVENTS, build_events
from quire_operator.watch.observed import Observed, WarningEvent

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
                "labels": {LABEL_REVISION: draw(st.sampled_from(["new", "old"])), "quire.dev/deployment": NAME},
            },
            "spec": {
                "nodeName": draw(st.sampled_from(["", "node-1"])),
                "containers": [{"name": "server", "ports": [{"name": "http", "containerPort": 8000}]}],
            },
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
        workload = build_workload(
            *draw(_conditions),
            revision=draw(st.sampled_from(["new", "old"])),
            replicas=draw(_counts),
            updatedReplicas=draw(_counts),
        )
    claim = {"metadata": {"name": "claim"}, "spec": {}, "status": {"phase": draw(st.sampled_from(["Pending", "Lost"]))}}
    job = {"metadata": {"name": "job"}, "status": {"startTime": draw(_times), "completionTime": draw(_times)}}
    observed = build_observed(
        *draw(_pods()),
        workload=workload,
        manifest=build_manifest(spec),
        volume=draw(st.sampled_from([None, claim])),
        job=draw(st.sampled_from([None, job])),
        job_pods=draw(_pods()),
        progress=draw(_progress),
        readiness=draw(_readiness),
        warnings=draw(_warnings),
    )
    plan = build_plan(
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
@hypothesis_settings(max_examples=150)
def test_any_status_is_valid_and_stable(case: tuple[Observed, Plan, bool]) -> None:
    observed, plan, gateway = case
    before = deepcopy(observed)
    status = derive(observed, plan, gateway=gateway)
    check(status)
    assert "\n" not in status["reason"]
    assert observed == before, "nothing observed is changed"
    again = replace(observed, manifest={**observed.manifest, "status": status})
    second = derive(again, plan, gateway=gateway, now=LATER)
    assert second == status
    if status["reason"] == "":
        assert shown_condition(status, "Ready")[0] == "True"
    if shown_condition(status, "Ready")[0] == "True":
        assert status["readyReplicas"] > 0 or (gateway and not observed.manifest["spec"]["suspend"])
    events = build_events(observed.manifest, status, second, (), (), LATER)
    assert events == (), "nothing changed, so nothing is said"
    assert len(build_events(observed.manifest, {}, status, (), (), NOW)) <= MAX_EVENTS
