"""A container that the kubelet ended because of a probe, told by the kubelet's own Events.

The texts are those of pkg/kubelet/kuberuntime/kuberuntime_manager.go and pkg/kubelet/prober/prober.go of Kubernetes.
"""

from typing import Any

import pytest
from status_objects import NOW, build_observed, build_pod, derive, look, shown_condition

from quire_kube.objects import Manifest
from quire_kube.times import format_time
from quire_operator.status.pod_reasons import find_pod_problem
from quire_operator.watch.observed import WarningEvent
from quire_operator.watch.packing import trim

REFUSED = (
    'Startup probe failed: Get "http://10.244.0.57:8000/readyz": dial tcp 10.244.0.57:8000: connect: connection refused'
)
KILLING = "Container server failed startup probe, will be restarted"
CURE = "raise startupProbe.failureThreshold in spec.podTemplate"


def _event(reason: str, message: str, *, at: float = NOW + 60, container: str = "server") -> WarningEvent:
    return WarningEvent(kind="Pod", name="pod-a", reason=reason, message=message, time=at, container=container)


def _killed(exit_code: int = 0, message: str = "", container: str = "server", **probe: int) -> Manifest:
    """Build a pod whose container was ended a minute after it began, and runs again."""
    began, ended = format_time(NOW), format_time(NOW + 61)
    end = {"exitCode": exit_code, "reason": "Completed", "message": message, "startedAt": began, "finishedAt": ended}
    pod = build_pod(lastState={"terminated": end}, restartCount=1)
    pod["status"]["containerStatuses"][0]["name"] = container
    pod["spec"]["containers"][0] |= {"name": container, "startupProbe": {"periodSeconds": 5, **probe}}
    return trim(pod)


def _line(pod: Manifest, *events: WarningEvent) -> str:
    found = find_pod_problem(pod, events)
    assert found is not None
    return found.line


@pytest.mark.parametrize(
    ("events", "line"),
    [
        (
            [_event("Killing", KILLING), _event("Unhealthy", REFUSED)],
            "StartupProbeFailed: the server was not up within 60 s (/readyz: connection refused), so it was ended;"
            f" {CURE}",
        ),
        (
            [
                _event("Killing", KILLING),
                _event("Unhealthy", "Startup probe failed: HTTP probe failed with statuscode: 503"),
                _event("FailedPreStopHook", "PreStopHook failed"),
            ],
            "StartupProbeFailed: the server was not up within 60 s (HTTP probe failed with statuscode: 503), so it was"
            f" ended; its preStop hook failed; {CURE}",
        ),
        (
            [_event("Killing", "Container server failed liveness probe, will be restarted")],
            "LivenessProbeFailed: the server did not answer within 30 s, so it was ended; see its log, or raise"
            " livenessProbe.failureThreshold in spec.podTemplate",
        ),
    ],
    ids=["connection refused", "503 and preStop", "liveness"],
)
@pytest.mark.parametrize("exit_code", [0, 137, 143])
def test_the_probe_its_budget_and_the_cure_are_named(events: list[WarningEvent], line: str, exit_code: int) -> None:
    assert _line(_killed(exit_code, failureThreshold=12), *events) == line


def test_a_log_that_ends_in_an_orderly_farewell_does_not_hide_the_probe() -> None:
    assert _line(_killed(143, "INFO shutting down\n"), _event("Killing", KILLING)).startswith("StartupProbeFailed: ")


def test_an_initial_delay_is_part_of_the_budget() -> None:
    assert "within 75 s" in _line(_killed(failureThreshold=12, initialDelaySeconds=15), _event("Killing", KILLING))


@pytest.mark.parametrize(
    "event",
    [
        _event("Killing", "Stopping container server"),
        _event("Killing", KILLING, at=NOW - 5),
        _event("Killing", "Container proxy failed liveness probe, will be restarted", container="proxy"),
        _event("Unhealthy", REFUSED),
        WarningEvent(kind="Pod", name="pod-b", reason="Killing", message=KILLING, time=NOW + 60),
    ],
    ids=["a deletion", "an earlier run", "another container", "no kill", "another pod"],
)
def test_what_no_probe_ended_is_said_as_before(event: WarningEvent) -> None:
    assert _line(_killed(), event) == "Crashed: ended with exit code 0 without a word; its log may say why"


def test_a_sidecar_that_a_probe_ends_is_named() -> None:
    killing = _event("Killing", "Container proxy failed startup probe, will be restarted", container="proxy")
    said = _line(_killed(container="proxy", failureThreshold=2), killing)
    assert said.startswith("StartupProbeFailed: container proxy: it was not up within 10 s")


def test_the_status_says_it() -> None:
    pod, events = _killed(failureThreshold=12), (_event("Killing", KILLING), _event("Unhealthy", REFUSED))
    observed = build_observed(pod, warnings=events)
    phase, reason, ready = look(observed)
    assert (phase, ready) == ("Loading", ("False", "StartupProbeFailed"))
    assert reason.startswith("StartupProbeFailed: the server was not up within 60 s")
    status: dict[str, Any] = derive(observed)
    assert shown_condition(status, "Loaded") == ("False", "StartupProbeFailed")
