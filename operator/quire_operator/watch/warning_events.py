"""Events that tell of trouble with the objects of one LLMDeployment: who is to be asked about, what the answers say.

Events are the only place where Kubernetes tells why a volume is not provisioned or mounted, why a Job has no pod, or
that a probe ended a container.
They are asked for object by object, only for objects that are stuck, and ever more seldom.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from quire_kube.api import Kube, KubeError
from quire_kube.objects import Manifest
from quire_kube.times import parse_time
from quire_operator.spec.kinds import EVENT
from quire_operator.watch.observed import Observed, WarningEvent
from quire_operator.watch.pods import (
    SCHEDULER_PATIENCE_S,
    SCHEDULING_PATIENCE_S,
    is_ending,
    is_ready,
    is_without_node,
    last_ends,
    why_unscheduled,
    without_node_for_s,
)

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
"""An object that is younger is not stuck."""
MAX_LOOK_AGAIN_S: Final = 300.0
_MAX_OBJECTS: Final = 4
_TROUBLE_CALLED_NORMAL: Final = frozenset({"Killing"})
_CONTAINER: Final = re.compile(r"\{(?P<name>[^}]+)\}$")
"""In what the kubelet writes about a container: `spec.containers{server}`."""


async def fetch_warnings(kube: Kube, observed: Observed, now: float) -> tuple[tuple[WarningEvent, ...], float | None]:
    """Return the newest Event of each kind about objects that are stuck, and when to ask again (None: need not)."""
    stuck = list(_find_stuck(observed, now))[:_MAX_OBJECTS]
    if not stuck:
        return (), None
    events: list[Manifest] = []
    for manifest, age_s in stuck:
        if age_s < PATIENCE_S:
            continue
        metadata = manifest["metadata"]
        selector = f"involvedObject.uid={metadata['uid']}"
        try:
            events += await kube.list(EVENT, metadata["namespace"], field_selector=selector)
        except KubeError as error:  # a reason that is missing holds up nothing else
            logger.warning("Reasons may be missing from the status: %s", error)
            break
    youngest_s = min(age_s for _, age_s in stuck)
    return read_warnings(events), min(max(PATIENCE_S, youngest_s / 4), MAX_LOOK_AGAIN_S)


def read_warnings(events: list[Manifest]) -> tuple[WarningEvent, ...]:
    """Return the newest Event that tells of trouble, for each object, container and reason; oldest first."""
    newest: dict[tuple[str, str, str, str], WarningEvent] = {}
    for warning in sorted((_read(event) for event in events if _is_trouble(event)), key=lambda warning: warning.time):
        newest[warning.kind, warning.name, warning.container, warning.reason] = warning
    return tuple(newest.values())


def _find_stuck(observed: Observed, now: float) -> Iterator[tuple[Manifest, float]]:
    """Yield objects that may be stuck, with their age in seconds; those that hold up the others first."""
    volume, job = observed.volume, observed.job
    if volume is not None and _status(volume).get("phase") != "Bound":
        yield volume, _age_s(volume, now)
    if job is not None and not observed.job_pods and not _status(job).get("conditions"):
        yield job, _age_s(job, now)
    for pod in (*observed.job_pods, *observed.pods):
        if _is_being_created(pod):
            yield pod, _age_s(pod, now)
        elif is_without_node(pod) and (age_s := without_node_for_s(pod, now)) < _scheduling_patience_s(pod):
            yield pod, age_s
        elif not is_ready(pod) and not is_ending(pod) and (ends := list(last_ends(pod))):
            yield pod, max(PATIENCE_S, min(_age_s_of_end(end, now) for end in ends))


def _scheduling_patience_s(pod: Manifest) -> float:
    """A scheduler says in the pod why there is no node, and no Event says more; only its age is waited for."""
    return SCHEDULING_PATIENCE_S if why_unscheduled(pod) is not None else SCHEDULER_PATIENCE_S


def _is_being_created(pod: Manifest) -> bool:
    """Whether a pod has a node and none of its containers has come further than being created."""
    status = _status(pod)
    if status.get("phase") != "Pending" or not (pod.get("spec") or {}).get("nodeName"):
        return False
    states = [container.get("state") or {} for container in status.get("containerStatuses") or ()]
    return all(
        (state.get("waiting") or {}).get("reason") in ("ContainerCreating", "PodInitializing") for state in states
    )


def _read(event: Manifest) -> WarningEvent:
    about = event.get("involvedObject") or {}
    series: dict[str, Any] = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    created = event["metadata"].get("creationTimestamp")
    return WarningEvent(
        kind=about.get("kind", ""),
        name=about.get("name", ""),
        reason=event.get("reason") or "",
        message=event.get("message") or event.get("note") or "",
        container=_container_of(about),
        time=next((time for text in (*times, created) if (time := parse_time(text)) is not None), 0.0),
    )


def _is_trouble(event: Manifest) -> bool:
    return event.get("type") == "Warning" or event.get("reason") in _TROUBLE_CALLED_NORMAL


def _container_of(about: Manifest) -> str:
    found = _CONTAINER.search(about.get("fieldPath") or "")
    return "" if found is None else found["name"]


def _age_s_of_end(ended: Mapping[str, Any], now: float) -> float:
    finished = parse_time(ended.get("finishedAt"))
    return 0.0 if finished is None else max(now - finished, 0.0)


def _age_s(manifest: Manifest, now: float) -> float:
    created = parse_time(manifest["metadata"].get("creationTimestamp"))
    return 0.0 if created is None else max(now - created, 0.0)


def _status(manifest: Manifest) -> dict[str, Any]:
    status: dict[str, Any] = manifest.get("status") or {}
    return status
