"""What one pod says of itself: placed, running, ready, ending. Each question about a pod is asked here, and only here.

Reads what scheduler and kubelet write into `status`; says nothing about what to do, nor why a container failed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quire_kube.objects import Manifest
from quire_kube.times import parse_time

VOLUME_NOT_BOUND: Final = "VolumeNotBound"
_SCHEDULER_TAIL: Final = re.compile(r"[.,]?\s*(no new claims to deallocate,\s*)?preemption:.*$", re.DOTALL)
_INSUFFICIENT: Final = re.compile(r"Insufficient (\S+?)(?=[,.]?(?:\s|$))")
_GPU_RESOURCES: Final = re.compile(r"gpu|nvidia\.com/|habana\.ai/|google\.com/tpu|amd\.com/")
_SCHEDULING_REASONS: Final = (
    ("no nodes available", "NoNodes"),
    ("unbound immediate PersistentVolumeClaims", VOLUME_NOT_BOUND),
    ("persistent volumes to bind", VOLUME_NOT_BOUND),
    ("persistentvolumeclaim", VOLUME_NOT_BOUND),
    ("volume node affinity conflict", "VolumeNodeConflict"),
    ("Too many pods", "TooManyPods"),
    ("didn't match Pod's node affinity", "NoMatchingNode"),
    ("untolerated taint", "UntoleratedTaint"),
    ("were unschedulable", "NodesCordoned"),
)
_BY_RESOURCE: Final = {"memory": "InsufficientMemory", "cpu": "InsufficientCPU"}


SCHEDULING_PATIENCE_S: Final = 10.0
"""A pod may be without a node for so long on a healthy start: its volume is made, or another pod is just going."""
SCHEDULER_PATIENCE_S: Final = 30.0
"""A scheduler that has said nothing by then is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unscheduled:
    """Why a pod has no node: a word, and what the scheduler says."""

    reason: str
    message: str


def is_over(pod: Manifest) -> bool:
    """Whether no container will run in a pod again: evicted, refused by its node, or completed."""
    return (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")


def is_ending(manifest: Manifest) -> bool:
    return "deletionTimestamp" in manifest["metadata"]


def condition_of(manifest: Manifest, type_: str) -> Manifest | None:
    """Return one of an object's `status.conditions`."""
    conditions = (manifest.get("status") or {}).get("conditions") or ()
    return next((condition for condition in conditions if condition.get("type") == type_), None)


def has_condition(manifest: Manifest, type_: str) -> bool:
    """Tell whether one of an object's conditions is True."""
    condition = condition_of(manifest, type_)
    return condition is not None and condition.get("status") == "True"


def is_ready(pod: Manifest) -> bool:
    return has_condition(pod, "Ready")


def is_scheduled(pod: Manifest) -> bool:
    return has_condition(pod, "PodScheduled")


def unschedulable_condition(pod: Manifest) -> Manifest | None:
    """Return what the scheduler says of a pod that it found no node for."""
    condition = condition_of(pod, "PodScheduled")
    if condition is None or condition.get("status") != "False" or condition.get("reason") != "Unschedulable":
        return None
    return condition


def is_running(pod: Manifest) -> bool:
    """Whether its main containers have started, all of them."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return bool(statuses) and all((status.get("state") or {}).get("running") for status in statuses)


def running_init_container(pod: Manifest) -> str:
    """Return the name of the init container that the others wait for: none of the sidecars, which go on running."""
    spec, status = pod.get("spec") or {}, pod.get("status") or {}
    sidecars = {one["name"] for one in spec.get("initContainers") or () if one.get("restartPolicy") == "Always"}
    running = (one for one in status.get("initContainerStatuses") or () if (one.get("state") or {}).get("running"))
    return next((str(one["name"]) for one in running if one["name"] not in sidecars), "")


def has_started(pod: Manifest) -> bool:
    """Whether a main container has passed its startup probe, which for a server means that it was ready once."""
    return any(status.get("started") for status in (pod.get("status") or {}).get("containerStatuses") or ())


def restart_count(pod: Manifest) -> int:
    return sum(int(status.get("restartCount", 0)) for status in container_statuses(pod))


def container_statuses(pod: Manifest) -> Iterator[Mapping[str, Any]]:
    """Yield those of init containers first."""
    status = pod.get("status") or {}
    yield from status.get("initContainerStatuses") or ()
    yield from status.get("containerStatuses") or ()


def can_answer(pod: Manifest) -> bool:
    """Tell whether a pod runs, has an address, and is to stay."""
    status = pod.get("status") or {}
    return status.get("phase") == "Running" and bool(status.get("podIP")) and not is_ending(pod)


def why_unscheduled(pod: Manifest) -> Unscheduled | None:
    """Tell why a pod has no node; None for one that has, or that nobody has looked at yet."""
    if (pod.get("spec") or {}).get("nodeName") or is_scheduled(pod):
        return None
    scheduled = condition_of(pod, "PodScheduled") or {}
    message = _SCHEDULER_TAIL.sub("", str(scheduled.get("message") or "")).rstrip(". ")
    if not message:
        return None
    is_gated = scheduled.get("reason") == "SchedulingGated"
    return Unscheduled(reason="SchedulingGated" if is_gated else _scheduling_reason(message), message=message)


def is_without_node(pod: Manifest) -> bool:
    """Whether a pod that may still run has no node."""
    return not ((pod.get("spec") or {}).get("nodeName") or is_scheduled(pod) or is_over(pod))


def without_node_for_s(pod: Manifest, at: float) -> float:
    """Return for how long the scheduler has found no node for a pod, or has not looked at it."""
    condition = condition_of(pod, "PodScheduled") or {}
    since = parse_time(condition.get("lastTransitionTime") or pod["metadata"].get("creationTimestamp"))
    return math.inf if since is None else at - since


def last_ends(pod: Manifest) -> Iterator[Mapping[str, Any]]:
    """Yield how the containers that do not run well last ended."""
    for status in container_statuses(pod):
        ended = (status.get("state") or {}).get("terminated") or (status.get("lastState") or {}).get("terminated")
        if ended is not None and not status.get("ready"):
            yield ended


def _scheduling_reason(message: str) -> str:
    """Name what is missing: a GPU before anything else, because that is what users wait for."""
    missing = _INSUFFICIENT.findall(message)
    if any(_GPU_RESOURCES.search(resource) for resource in missing):
        return "InsufficientGPU"
    for resource, reason in _BY_RESOURCE.items():
        if resource in missing:
            return reason
    if missing:
        return "InsufficientStorage" if missing[0] == "ephemeral-storage" else "InsufficientResource"
    return next((reason for text, reason in _SCHEDULING_REASONS if text in message), "Unschedulable")
