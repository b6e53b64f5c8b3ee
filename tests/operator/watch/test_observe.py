"""What is gathered about one LLMDeployment, and whom to ask for the rest."""

import asyncio
from typing import Any

import pytest
from fake_kube import FakeKube
from store_objects import CLAIM, JOB_NAME, KEY, SHARED_LABELS, llm, make

from quire_contract import names
from quire_contract.model_facts import DownloadProgress
from quire_contract.phases import Phase, Readiness
from quire_kube.api import ForbiddenError
from quire_kube.objects import Manifest
from quire_kube.times import format_time, parse_time
from quire_operator.spec.kinds import EVENT, JOB, PERSISTENT_VOLUME_CLAIM, POD
from quire_operator.watch.observe import (
    PodAnswers,
    observe,
    pod_to_ask_progress,
    pods_to_ask_loads,
    pods_to_ask_readiness,
)
from quire_operator.watch.observed import Observed
from quire_operator.watch.store import Store
from quire_operator.watch.warning_events import MAX_LOOK_AGAIN_S, PATIENCE_S, fetch_warnings, read_warnings

CREATED = "2026-01-31T12:00:00Z"
NOW = parse_time(CREATED) or 0.0
READY = {"conditions": [{"type": "Ready", "status": "True"}]}


def pod(name: str, *, ending: bool = False, **status: Any) -> Manifest:
    manifest = make(POD, name, uid=name, labels={names.LABEL_DEPLOYMENT: "smollm2"}, status=status)
    manifest["metadata"]["creationTimestamp"] = CREATED
    if ending:
        manifest["metadata"]["deletionTimestamp"] = CREATED
    return manifest


def test_everything_is_gathered() -> None:
    store = Store()
    for manifest in (
        llm(),
        llm("other", uid="llm-2"),
        make(PERSISTENT_VOLUME_CLAIM, CLAIM, labels=SHARED_LABELS),
        make(JOB, JOB_NAME, labels=SHARED_LABELS),
        make(POD, "d", uid="d", labels={"batch.kubernetes.io/job-name": JOB_NAME}),
        pod("p"),
    ):
        store.put(manifest)
    progress, readiness = DownloadProgress(done_bytes=1), {"p": Readiness(phase=Phase.LOADING)}
    found = observe(store, KEY, probes=PodAnswers(readiness=readiness, progress=progress), loads={"p": 3})
    assert found is not None
    assert found.volume is not None
    assert found.job is not None
    assert [m["metadata"]["name"] for m in (found.volume, found.job, *found.job_pods, *found.pods)] == [
        CLAIM,
        JOB_NAME,
        "d",
        "p",
    ]
    assert found.other_cache_users == {"other"}
    assert (found.progress, found.readiness, found.loads) == (progress, readiness, {"p": 3})


def test_a_deployment_that_is_not_there_is_none() -> None:
    assert observe(Store(), KEY) is None


def test_a_model_that_needs_no_volume_has_none() -> None:
    store = Store()
    store.put(llm(model={"uri": "oci://registry.example/acme/model:1"}))
    found = observe(store, KEY)
    assert found is not None
    assert (found.volume, found.job, found.job_pods, found.other_cache_users) == (None, None, (), frozenset())


def test_who_is_asked_what() -> None:
    running = {"phase": "Running", "podIP": "10.0.0.1"}
    pods = (
        pod("ready", **running, **READY),
        pod("loading", **running),
        pod("ending", ending=True, **running),
        pod("pending", phase="Pending"),
        pod("no-address", phase="Running"),
    )
    older, newer = pod("older", **running), pod("newer", **running)
    newer["metadata"]["creationTimestamp"] = "2026-01-31T12:00:05Z"
    observed = Observed(manifest=llm(), pods=pods, job_pods=(newer, older, pod("done", phase="Succeeded")))
    assert [p["metadata"]["name"] for p in pods_to_ask_readiness(observed)] == ["loading"]
    assert [p["metadata"]["name"] for p in pods_to_ask_loads(observed)] == ["ready", "loading", "ending"]
    assert pod_to_ask_progress(observed) is newer
    assert pod_to_ask_progress(Observed(manifest=llm(), pods=pods)) is None


def warning(uid: str, reason: str, time: str, **fields: Any) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "type": "Warning",
        "metadata": {"name": f"{uid}.{reason}.{time}", "namespace": "default", "creationTimestamp": CREATED},
        "involvedObject": {"kind": "Pod", "name": uid, "uid": uid},
        "reason": reason,
        "message": f"{reason} at {time}",
        "lastTimestamp": time,
        **fields,
    }


def test_the_newest_warning_of_each_reason_counts() -> None:
    later = "2026-01-31T12:05:00Z"
    series = {"lastTimestamp": None, "eventTime": CREATED, "series": {"lastObservedTime": "2026-01-31T12:09:00Z"}}
    found = read_warnings(
        [
            warning("p", "FailedMount", later),
            warning("p", "FailedMount", CREATED),
            warning("p", "FailedAttachVolume", CREATED, **series),
        ]
    )
    assert [(w.reason, w.time - NOW) for w in found] == [("FailedMount", 300.0), ("FailedAttachVolume", 540.0)]


def creating(name: str = "p") -> Manifest:
    manifest = pod(name, phase="Pending", containerStatuses=[{"state": {"waiting": {"reason": "ContainerCreating"}}}])
    return {**manifest, "spec": {"nodeName": "n"}}


@pytest.mark.parametrize(
    ("age_s", "num_calls", "look_again_s"), [(5, 0, 10), (60, 1, 15), (400, 1, 100), (9000, 1, MAX_LOOK_AGAIN_S)]
)
def test_stuck_objects_are_asked_about_ever_more_seldom(age_s: float, num_calls: int, look_again_s: float) -> None:
    kube = FakeKube()
    kube.put(warning("p", "FailedMount", CREATED))
    kube.put(warning("another", "FailedMount", CREATED))
    kube.put(warning("p", "Pulled", CREATED, type="Normal"))
    observed = Observed(manifest=llm(), pods=(creating(),))
    warnings, again_s = asyncio.run(fetch_warnings(kube, observed, NOW + age_s))
    assert len(kube.calls) == num_calls
    assert [(w.name, w.reason) for w in warnings] == [("p", "FailedMount")] * num_calls
    assert again_s == look_again_s


def test_what_is_well_is_not_asked_about() -> None:
    kube = FakeKube()
    claim = make(PERSISTENT_VOLUME_CLAIM, CLAIM, status={"phase": "Bound"})
    unscheduled = {**creating(), "spec": {}}
    observed = Observed(manifest=llm(), volume=claim, pods=(pod("a", phase="Running", **READY), unscheduled))
    assert asyncio.run(fetch_warnings(kube, observed, NOW + 9000)) == ((), None)
    assert kube.calls == []


def test_without_the_right_to_read_events_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    kube = FakeKube()
    kube.refuse = lambda verb, ref: ForbiddenError("may not list events") if ref.kind == EVENT else None
    observed = Observed(manifest=llm(), pods=(creating("p"), creating("q")))
    assert asyncio.run(fetch_warnings(kube, observed, NOW + 60)) == ((), 15)
    assert "may not list events" in caplog.text
    assert len(kube.calls) == 1


def restarted(age_s: float) -> Manifest:
    ended = {"exitCode": 0, "finishedAt": format_time(NOW + age_s)}
    status = {"name": "server", "ready": False, "state": {"running": {}}, "lastState": {"terminated": ended}}
    return pod("p", phase="Running", containerStatuses=[status])


def test_who_ended_a_container_is_asked_at_once_and_killing_counts_though_it_is_called_normal() -> None:
    about = {"kind": "Pod", "name": "p", "uid": "p", "fieldPath": "spec.containers{server}"}
    kube = FakeKube()
    kube.put(warning("p", "Killing", CREATED, type="Normal", involvedObject=about))
    kube.put(warning("p", "Unhealthy", CREATED, involvedObject=about))
    kube.put(warning("p", "Started", CREATED, type="Normal", involvedObject=about))
    observed = Observed(manifest=llm(), pods=(restarted(600),))
    warnings, again_s = asyncio.run(fetch_warnings(kube, observed, NOW + 600))
    assert sorted((one.reason, one.container) for one in warnings) == [("Killing", "server"), ("Unhealthy", "server")]
    assert again_s == PATIENCE_S


def without_node(said: str) -> Manifest:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    conditions = [condition | {"lastTransitionTime": CREATED}] if said else []
    return {**pod("p", phase="Pending", conditions=conditions), "spec": {}}


@pytest.mark.parametrize(
    ("said", "age_s", "look_again_s"),
    [("no GPU", 3, 10), ("no GPU", 11, None), ("", 3, 10), ("", 29, 10), ("", 31, None)],
)
def test_a_pod_without_a_node_is_looked_at_again_until_its_time_is_up(
    said: str, age_s: float, look_again_s: float | None
) -> None:
    observed = Observed(manifest=llm(), pods=(without_node(said),))
    assert asyncio.run(fetch_warnings(FakeKube(), observed, NOW + age_s)) == ((), look_again_s)
