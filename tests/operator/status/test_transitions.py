"""Events: one for each transition that matters, none without one, never many at once."""

from typing import Any

import pytest

from quire_kube.objects import Manifest, Ref
from quire_operator.plan.actions import Action, Annotate, Apply, Delete, SetReplicas, Verdict
from quire_operator.spec.kinds import DEPLOYMENT, JOB
from quire_operator.status.transitions import MAX_EVENTS, build_events

NOW = 1_763_722_800.0
MANIFEST: Manifest = {
    "apiVersion": "quire.dev/v1alpha1",
    "kind": "LLMDeployment",
    "metadata": {"name": "smollm2", "namespace": "ai", "uid": "llm-uid", "resourceVersion": "7"},
}
Shown = dict[str, tuple[str, str, str]]
GOOD: Shown = {
    "Accepted": ("True", "Accepted", "The spec can be carried out"),
    "ModelCached": ("True", "Cached", "1.0 GiB in c."),
    "Fits": ("True", "Fits", "64 sequences."),
    "Loaded": ("True", "Loaded", "All."),
    "RolloutComplete": ("True", "Complete", "All."),
    "Ready": ("True", "Serving", "1 of 1 replica ready"),
}


def _status(**changes: tuple[str, str, str]) -> dict[str, Any]:
    shown = {**GOOD, **changes}
    return {
        "conditions": [
            {"type": type_, "status": status, "reason": reason, "message": message}
            for type_, (status, reason, message) in shown.items()
        ]
    }


def _said(old: dict[str, Any], new: dict[str, Any], *applied: Action) -> list[tuple[str, str, str]]:
    events = build_events(MANIFEST, old, new, applied, (), NOW)
    return [(event["type"], event["reason"], event["message"]) for event in events]


def _child(kind: str = "Deployment", api_version: str = "apps/v1", name: str = "smollm2") -> Manifest:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": "ai"}}


LOADING = ("False", "Loading", "0 of 1")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (_status(), _status(), []),
        ({}, _status(Ready=LOADING, Loaded=LOADING, RolloutComplete=("False", "Progressing", "")), [
            ("Normal", "ModelCached", "1.0 GiB in c."),
        ]),
        (
            _status(Loaded=LOADING, Ready=LOADING, RolloutComplete=("False", "Progressing", "")),
            _status(),
            [("Normal", "RolloutComplete", "All."), ("Normal", "Ready", "1 of 1 replica ready")],
        ),
        (
            _status(),
            _status(Accepted=("False", "InvalidSpec", "spec.x: no"), RolloutComplete=("False", "NotAccepted", "")),
            [("Warning", "InvalidSpec", "spec.x: no")],
        ),
        (
            _status(Accepted=("False", "InvalidSpec", "spec.x: no")),
            _status(),
            [("Normal", "Accepted", "The spec can be carried out")],
        ),
        (
            _status(Loaded=LOADING, Ready=LOADING),
            _status(Loaded=("False", "CrashLoop", "ValueError"), Ready=("False", "CrashLoop", "ValueError")),
            [("Warning", "CrashLoop", "ValueError")],
        ),
        (
            _status(ModelCached=("False", "Downloading", "1 of 2"), Ready=("False", "Downloading", "")),
            _status(ModelCached=("False", "Downloading", "2 of 2"), Ready=("False", "Downloading", "")),
            [],
        ),
        (
            _status(ModelCached=("False", "Downloading", ""), Ready=("False", "Downloading", "")),
            _status(ModelCached=("False", "ModelGated", "long"), Ready=("False", "ModelGated", "short")),
            [("Warning", "ModelGated", "long")],
        ),
        (
            _status(RolloutComplete=("False", "Progressing", "")),
            _status(RolloutComplete=("False", "RolloutBlocked", "no GPU")),
            [("Warning", "RolloutBlocked", "no GPU")],
        ),
        (_status(), _status(Ready=("False", "Suspended", "asleep")), [("Normal", "Suspended", "asleep")]),
        (
            _status(),
            _status(Ready=("True", "ScaledToZero", "the gateway wakes it")),
            [("Normal", "ScaledToZero", "the gateway wakes it")],
        ),
        (
            _status(),
            _status(Loaded=("True", "Restarted", "pod-a was restarted once, last for OutOfMemory")),
            [("Warning", "Restarted", "pod-a was restarted once, last for OutOfMemory")],
        ),
        (
            _status(Loaded=("True", "Restarted", "once")),
            _status(Loaded=("True", "Restarted", "twice")),
            [("Warning", "Restarted", "twice")],
        ),
        (
            _status(Loaded=("False", "OutOfMemory", "killed")),
            _status(Loaded=("True", "Restarted", "once, for OutOfMemory")),
            [],
        ),
    ],
    ids=[
        "nothing changed", "begun", "came up", "refused", "accepted again", "crashed, said once", "progress",
        "gated", "blocked", "suspended", "scaled to zero", "restarted between looks", "restarted again",
        "restart that was told",
    ],
)  # fmt: skip
def test_transitions(old: dict[str, Any], new: dict[str, Any], said: list[tuple[str, str, str]]) -> None:
    assert _said(old, new) == said


def test_what_was_done_to_children() -> None:
    ref = Ref(kind=JOB, namespace="ai", name="quire-download-1")
    said = _said(
        _status(),
        _status(),
        Apply(manifest=_child("Service", "v1"), reason="Created"),
        Apply(manifest=_child("ServiceAccount", "v1"), reason="Created"),
        Apply(manifest=_child(), reason="Healed: spec.replicas was edited", is_drift=True),
        Apply(manifest=_child("NetworkPolicy", "networking.k8s.io/v1"), reason="Changed: spec.ingress"),
        Delete(ref=ref, uid="u", reason="Done: the model is in the volume"),
        SetReplicas(ref=Ref(kind=DEPLOYMENT, namespace="ai", name="smollm2"), replicas=1, reason="Changed"),
        Annotate(ref=ref, annotations={}, reason="Downloaded"),
    )
    assert said == [
        ("Normal", "Healed", "Deployment smollm2: spec.replicas was edited"),
        ("Normal", "Created", "Created Service smollm2, ServiceAccount smollm2"),
        ("Normal", "Updated", "Updated NetworkPolicy smollm2 (spec.ingress)"),
        ("Normal", "Deleted", "Deleted Job quire-download-1 (Done: the model is in the volume)"),
    ]


def test_never_many_and_what_is_wrong_first() -> None:
    bad = ("False", "Broken", "x")
    heals = [
        Apply(manifest=_child(name=f"n{index}"), reason="Healed: a was edited", is_drift=True) for index in range(20)
    ]
    said = _said(_status(), _status(Ready=bad), *heals)
    assert len(said) == MAX_EVENTS
    assert said[0] == ("Warning", "Broken", "x")


def test_what_is_done_without_is_one_warning_for_each_reason() -> None:
    refused = [
        Verdict(holds=False, reason="Forbidden", message="ServiceMonitor ai/a: may not"),
        Verdict(holds=False, reason="RefusedByServer", message="PrometheusRule ai/a: spec.groups: Required value"),
        Verdict(holds=False, reason="Forbidden", message="Pod ai/p: may not"),
    ]
    events = build_events(MANIFEST, _status(), _status(), (), refused, NOW)
    assert [(event["type"], event["reason"], event["message"]) for event in events] == [
        ("Warning", "Forbidden", "Done without, and tried again: ServiceMonitor ai/a: may not; Pod ai/p: may not"),
        (
            "Warning",
            "RefusedByServer",
            "Done without, and tried again: PrometheusRule ai/a: spec.groups: Required value",
        ),
    ]
    again = build_events(MANIFEST, _status(), _status(), (), refused, NOW + 3000)
    assert [event["metadata"] for event in again] == [event["metadata"] for event in events]


def test_an_event_as_the_api_server_takes_it() -> None:
    (event,) = build_events(MANIFEST, _status(), _status(Ready=("False", "CrashLoop", "x" * 5000)), (), (), NOW)
    assert event["metadata"]["namespace"] == event["involvedObject"]["namespace"] == "ai"
    assert event["metadata"]["name"].startswith("smollm2.")
    assert event["involvedObject"] == {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "LLMDeployment",
        "name": "smollm2",
        "namespace": "ai",
        "uid": "llm-uid",
        "resourceVersion": "7",
    }
    assert event["reportingComponent"] == event["source"]["component"] == "quire-operator"
    assert event["firstTimestamp"] == event["lastTimestamp"] == "2025-11-21T11:00:00Z"
    assert len(event["message"]) == 1024


def test_the_same_transition_has_the_same_name_at_any_time() -> None:
    new = _status(Ready=("False", "CrashLoop", "x"))
    (first,) = build_events(MANIFEST, _status(), new, (), (), NOW)
    (again,) = build_events(MANIFEST, _status(), new, (), (), NOW + 500)
    assert first["metadata"] == again["metadata"]
    later = {**MANIFEST, "metadata": {**MANIFEST["metadata"], "resourceVersion": "8"}}
    (other,) = build_events(later, _status(), new, (), (), NOW)
    assert other["metadata"] != first["metadata"]


def test_a_deed_done_again_is_said_once_a_minute() -> None:
    healed = Apply(manifest=_child(), reason="Healed: spec.replicas was edited", is_drift=True)
    names = [
        build_events(MANIFEST, _status(), _status(), (healed,), (), NOW + seconds)[0]["metadata"]["name"]
        for seconds in (0, 1, 61)
    ]
    assert names[0] == names[1] != names[2]
