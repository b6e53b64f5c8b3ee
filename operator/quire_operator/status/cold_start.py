"""How long a start takes: measured from what pods and the download Job say of themselves, never by our own clock.

A pod is counted once, when it is ready for the first time and was never restarted. `status.coldStart` remembers the
start time and uid of the last pod counted, and only pods that started after it count, so that a pod which becomes
unready and ready again, or an operator that starts anew, counts nothing twice.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from quire_kube.objects import Manifest
from quire_kube.times import format_time, parse_time
from quire_operator.watch.pods import condition_of, is_ending, is_ready, restart_count

MAX_RECENT: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Start:
    """One pod's way to ready. Ordered by when its container started."""

    started_at: float
    uid: str
    schedule_s: float
    pull_s: float
    load_s: float


def measure_start(pod: Manifest) -> Start | None:
    """Read one pod's start; None where it has not happened, or happened more than once."""
    if not is_ready(pod) or is_ending(pod) or restart_count(pod):
        return None
    created = parse_time(pod["metadata"].get("creationTimestamp"))
    scheduled = parse_time((condition_of(pod, "PodScheduled") or {}).get("lastTransitionTime"))
    ready = parse_time((condition_of(pod, "Ready") or {}).get("lastTransitionTime"))
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    starts = [parse_time(((status.get("state") or {}).get("running") or {}).get("startedAt")) for status in statuses]
    known = [start for start in starts if start is not None]
    uid = pod["metadata"].get("uid")
    if created is None or scheduled is None or ready is None or not known or not uid:
        return None
    started = max(known)
    return Start(
        started_at=started,
        uid=uid,
        schedule_s=max(0.0, scheduled - created),
        pull_s=max(0.0, started - scheduled),
        load_s=max(0.0, ready - started),
    )


def measure_download(job: Manifest | None, job_pods: Iterable[Manifest] = ()) -> tuple[float, float] | None:
    """Return when a download ended and how long it took, all tries together; None where it has not.

    A Job learns of its end a moment after its pod, and is often deleted by then, so the pod's word counts too.
    """
    status = (job or {}).get("status") or {}
    began, ended = parse_time(status.get("startTime")), parse_time(status.get("completionTime"))
    if ended is None:
        ended = max((time for time in map(_succeeded_at, job_pods) if time is not None), default=None)
    return None if began is None or ended is None else (ended, max(0.0, ended - began))


def _succeeded_at(pod: Manifest) -> float | None:
    """Return when all containers had ended well; the pod's phase says so only a second later."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    ends = [(one.get("state") or {}).get("terminated") or {} for one in statuses]
    if any(end.get("exitCode") != 0 for end in ends):
        return None
    return max((time for end in ends if (time := parse_time(end.get("finishedAt"))) is not None), default=None)


def derive_cold_start(
    old: Mapping[str, Any] | None,
    pods: Iterable[Manifest],
    job: Manifest | None,
    job_pods: Iterable[Manifest] = (),
) -> dict[str, Any] | None:
    """Return `status.coldStart`, with every new start counted; None while nothing was measured.

    `recentSeconds` leave out the wait for a node, which says nothing about the next start, and the download, which
    does not happen again; `lastSeconds` is what the last start took with that wait.
    """
    result: dict[str, Any] = dict(old or {})
    last = (parse_time(result.get("podStartedAt")) or 0.0, str(result.get("pod", "")))
    download = measure_download(job, job_pods)
    if download is not None and download[0] > last[0]:
        result["stages"] = {"download": download[1]}
    for start in sorted(one for one in map(measure_start, pods) if one is not None):
        if (start.started_at, start.uid) > last:
            result = _count(result, start)
            last = (start.started_at, start.uid)
    return result or None


def _count(before: Mapping[str, Any], start: Start) -> dict[str, Any]:
    stages = {"schedule": start.schedule_s, "pull": start.pull_s, "load": start.load_s}
    former = before.get("stages") or {}
    if "download" in former and "load" not in former:  # measured, and this is the first pod after it
        stages["download"] = former["download"]
    recent = [*(before.get("recentSeconds") or ()), start.pull_s + start.load_s][-MAX_RECENT:]
    return {
        "lastSeconds": start.schedule_s + start.pull_s + start.load_s,
        "p50Seconds": median(recent),
        "recentSeconds": recent,
        "stages": stages,
        "pod": start.uid,
        "podStartedAt": format_time(start.started_at),
    }
