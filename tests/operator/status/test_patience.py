"""What is so for a moment on a healthy start is no trouble; what lasts is, and what names a single try is left out."""

from typing import Any

import pytest
from status_objects import (
    DOWNLOADING,
    LATER,
    NOW,
    TIME,
    build_observed,
    build_plan,
    build_pod,
    build_workload,
    derive,
    look,
    shown_condition,
    unschedulable,
)

from quire_kube.objects import Manifest
from quire_operator.status.pod_reasons import find_pod_problem
from quire_operator.status.reasons import Finding, Stage
from quire_operator.status.transitions import build_events

DIGEST = "0b5c1f2e" * 8


def _unseen(**spec: Any) -> Manifest:
    """Build a pod that no scheduler has looked at."""
    pod = build_pod()
    return {**pod, "spec": {**pod["spec"], "nodeName": None, **spec}, "status": {"phase": "Pending"}}


@pytest.mark.parametrize(("age_s", "is_told"), [(0, False), (9, False), (10, True), (3600, True)])
def test_a_pod_may_be_without_a_node_for_a_moment(age_s: float, is_told: bool) -> None:
    observed = build_observed(unschedulable(), workload=build_workload(), at=NOW + age_s)
    status = derive(observed)
    assert (shown_condition(status, "Ready")[1] == "InsufficientGPU") is is_told
    assert (shown_condition(status, "RolloutComplete")[1] == "RolloutBlocked") is is_told
    warnings = [
        event["reason"]
        for event in build_events(observed.manifest, {}, status, (), (), NOW)
        if event["type"] == "Warning"
    ]
    assert bool(warnings) is is_told


@pytest.mark.parametrize(("age_s", "is_told"), [(29, False), (30, True)])
def test_a_scheduler_that_is_not_there_is_named(age_s: float, is_told: bool) -> None:
    observed = build_observed(_unseen(schedulerName="volcano"), at=NOW + age_s)
    told = (
        "NoScheduler: no scheduler called volcano has looked at the pod; correct schedulerName in spec.podTemplate, or"
    )
    assert look(observed)[1].startswith(told) is is_told
    assert (shown_condition(derive(observed), "Scheduled") == ("False", "NoScheduler")) is is_told


def test_a_cluster_without_its_scheduler_is_told_too() -> None:
    said = look(build_observed(_unseen(schedulerName="default-scheduler"), at=LATER))[1]
    assert said == (
        "NoScheduler: no scheduler called default-scheduler has looked at the pod; see whether kube-scheduler runs"
    )


def test_a_running_download_is_not_disturbed_by_a_pod_of_another_job() -> None:
    pod = build_pod("job-pod")
    pod["metadata"]["ownerReferences"] = [{"kind": "Job", "name": "job", "uid": "an earlier one"}]
    assert look(build_observed(job_pods=(pod,)), build_plan(**DOWNLOADING))[2] == ("False", "Pending")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            'Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox "'
            + DIGEST
            + '": plugin type="bridge" failed',
            "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for the sandbox:"
            ' plugin type="bridge" failed',
        ),
        (
            "back-off 1m20s restarting failed container=proxy"
            " pod=smollm2-7d9c5b6f4d-x2k8p_ai(0b7c1a52-7f0b-4a53-9f6e-0f2f4d1c9e11)",
            "back-off restarting failed container=proxy the pod",
        ),
        (
            'Error creating: pods "smollm2-7d9c5b6f4d-x2k8p" is forbidden: exceeded quota',
            "Error creating: the pod is forbidden: exceeded quota",
        ),
        (
            "unable to find /var/lib/kubelet/pods/0b7c1a52-7f0b-4a53-9f6e-0f2f4d1c9e11/volumes",
            "unable to find /var/lib/kubelet/pods/…/volumes",
        ),
        ("2026-11-21T11:00:05.123Z out of file descriptors", "out of file descriptors"),
        ("[2026-11-21 11:00:05,123] out of file descriptors", "out of file descriptors"),
        (f"the sha256 checksum is {DIGEST}", f"the sha256 checksum is {DIGEST}"),
        ("0/3 nodes are available: 3 Insufficient cpu", "0/3 nodes are available: 3 Insufficient cpu"),
    ],
)
def test_a_finding_is_the_same_at_every_try(said: str, kept: str) -> None:
    assert Finding(stage=Stage.CONTAINER, reason="X", detail=said).detail == kept


def test_the_name_of_the_pod_is_left_out() -> None:
    pod = build_pod("smollm2-7d9c5b6f4d-x2k8p")
    status = {"phase": "Failed", "reason": "Evicted", "message": "smollm2-7d9c5b6f4d-x2k8p used too much"}
    found = find_pod_problem({**pod, "status": status}, ())
    assert found is not None
    assert found.line == "Evicted: the pod used too much"
    assert TIME not in found.line


@pytest.mark.parametrize("policy", [None, "Always"])
def test_an_init_container_that_runs_is_named_unless_it_is_a_sidecar(policy: str | None) -> None:
    pod = build_pod(state={"waiting": {"reason": "PodInitializing"}})
    pod["spec"]["initContainers"] = [{"name": "fetch", "restartPolicy": policy}]
    pod["status"]["initContainerStatuses"] = [
        {"name": "fetch", "ready": False, "state": {"running": {"startedAt": TIME}}}
    ]
    said = "Pending: Init container fetch runs; the server starts when it has ended"
    assert (look(build_observed(pod))[1] == said) is (policy is None)


@pytest.mark.parametrize("list_name", ["containerStatuses", "initContainerStatuses"])
def test_a_container_beside_the_server_is_named(list_name: str) -> None:
    pod = build_pod()
    last = {"terminated": {"exitCode": 1, "reason": "Error", "message": "no config\n"}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}}
    crashed = {"name": "proxy", "ready": False, "restartCount": 3, "state": waiting, "lastState": last}
    pod["status"][list_name] = [*pod["status"].get(list_name, ()), crashed]
    what = "init container" if list_name.startswith("init") else "container"
    assert look(build_observed(pod))[1] == f"CrashLoop: {what} proxy: no config"
