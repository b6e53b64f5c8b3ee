"""Warning Events about the objects of one LLMDeployment: who is to be asked about, and what the answers say.

Events are the only place where Kubernetes tells why a volume is not provisioned or mounted, or why a Job has no pod.
They are asked for object by object, only for objects that are stuck, and ever more seldom.
"""

import logging
from collections.abc import Iterator
from typing import Any, Final

from quire_kube.api import Kube, KubeError
from quire_kube.objects import Manifest
from quire_kube.times import parse_time
from quire_operator.spec.kinds import EVENT
from quire_operator.watch.observed import Observed, WarningEvent

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
"""An object that is younger is not stuck."""
MAX_LOOK_AGAIN_S: Final = 300.0
_MAX_OBJECTS: Final = 4


async def fetch_warnings(kube: Kube, observed: Observed, now: float) -> tuple[tuple[WarningEvent, ...], float | None]:
    """Return the newest Warning of each kind about objects that are stuck, and when to ask again (None: need not)."""
    stuck = list(_find_stuck(observed, now))[:_MAX_OBJECTS]
    if not stuck:
        return (), None
    events: list[Manifest] = []
    for manifest, age_s in stuck:
        if age_s < PATIENCE_S:
            continue
        metadata = manifest["metadata"]
        selector = f"involvedObject.uid={metadata['uid']},type=Warning"
        try:
            events += await kube.list(EVENT, metadata["namespace"], field_selector=selector)
        except KubeError as error:  # a reason that is missing holds up nothing else
            logger.warning("Reasons may be missing from the status: %s", error)
            break
    youngest_s = min(age_s for _, age_s in stuck)
    return read_warnings(events), min(max(PATIENCE_S, youngest_s / 4), MAX_LOOK_AGAIN_S)


def read_warnings(events: list[Manifest]) -> tuple[WarningEvent, ...]:
    """Return the newest Event for each object and reason, oldest first."""
    newest: dict[tuple[str, str, str], WarningEvent] = {}
    for warning in sorted((_read(event) for event in events), key=lambda warning: warning.time):
        newest[warning.kind, warning.name, warning.reason] = warning
    return tuple(newest.values())


def _find_stuck(observed: Observed, now: float) -> Iterator[tuple[Manifest, float]]:
    """Yield objects that may be stuck, with their age in seconds; those that hold up the others first."""
    volume, job = observed.volume, observed.job
    if volume is not None and _status(volume).get("phase") != "Bound":
        yield volume, _age_s(volume, now)
    if job is not None and not observed.job_pods and not _status(job).get("conditions"):
        yield job, _age_s(job, now)
    for pod in (*observed.job_pods, *observed.pods):
        if _is_waiting_for_node(pod):
            yield pod, _age_s(pod, now)


def _is_waiting_for_node(pod: Manifest) -> bool:
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
        time=next((time for text in (*times, created) if (time := parse_time(text)) is not None), 0.0),
    )


def _age_s(manifest: Manifest, now: float) -> float:
    created = parse_time(manifest["metadata"].get("creationTimestamp"))
    return 0.0 if created is None else max(now - created, 0.0)


def _status(manifest: Manifest) -> dict[str, Any]:
    status: dict[str, Any] = manifest.get("status") or {}
    return status
