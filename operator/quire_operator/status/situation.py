"""One look at an LLMDeployment: how many pods there are, how many serve, and the worst that is wrong in each respect.

What `conditions` and `status` both decide from, counted once. Knows nothing of how a status is written. Pods that are
over (evicted, refused by a node) are no replicas; of a group of pods that form one replica, the leader is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from quire_contract import model_facts, names
from quire_contract.model_facts import DownloadProgress
from quire_contract.names import LABEL_REVISION
from quire_contract.phases import Phase
from quire_contract.units import format_bytes
from quire_kube.objects import Manifest, Ref, label_of
from quire_operator.plan.actions import Plan, Verdict
from quire_operator.plan.admission import Subject
from quire_operator.plan.cache.download_pods import CONFIG_MAP_MISSING, SECRET_MISSING, pods_of_job
from quire_operator.plan.cache.volumes import NO_DEFAULT_STORAGE_CLASS, VOLUME_LOST
from quire_operator.plan.rollout import is_rollout_complete, live_workload, replicas_of
from quire_operator.spec.kinds import SERVICE, WORKER_INDEX_LABEL
from quire_operator.status.pod_reasons import find_pod_problem, find_restart_cause
from quire_operator.status.reachability import reached_pods
from quire_operator.status.reasons import (
    STORAGE_CLASS_CURE,
    Finding,
    Stage,
    find_job_refusal,
    find_volume_problem,
    find_workload_problem,
    is_deadline_exceeded,
    reason_line,
)
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed, WarningEvent
from quire_operator.watch.pods import (
    VOLUME_NOT_BOUND,
    condition_of,
    has_started,
    is_ending,
    is_over,
    is_ready,
    is_running,
    is_scheduled,
    restart_count,
    running_init_container,
)

DOWNLOADING: Final = "Downloading"
LOADING: Final = "Loading"
PROGRESS_REASONS: Final = frozenset({DOWNLOADING, "VolumePending", "VolumeGrowing"})
"""Reasons for which a model is not cached yet, and nobody has to do anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything that is counted or found; texts are fit for conditions."""

    desired: int
    is_suspended: bool
    num_live: int
    """Replicas that exist, neither ending nor over."""
    num_ready: int
    num_reached: int
    """Ready replicas that the Service leads to: those that answer a client."""
    num_ending: int
    num_old: int
    """Live replicas of another template than the wanted one."""
    has_service: bool
    """The very Service that clients call is there."""
    is_template_current: bool
    """The live workload has the wanted template."""
    is_rolled_out: bool
    is_deadline_exceeded: bool
    are_all_scheduled: bool
    is_job_running: bool
    running_init: str
    """An init container that a pod waits for; empty where none does."""
    is_pod_started: bool
    """A server process runs, ready or not."""
    model_problem: Finding | None
    workload_problem: Finding | None
    pod_problem: Finding | None
    """The worst of any pod."""
    current_problem: Finding | None
    """The worst of the pods with the wanted template."""
    scheduling_problem: Finding | None
    restarts: str
    """Which pods were restarted, and why; empty where none was."""
    download_line: str
    loading_line: str

    @property
    def is_serving(self) -> bool:
        return self.num_reached > 0


def look(observed: Observed, plan: Plan, cluster: ClusterFacts) -> Situation:
    """Count and find."""
    spec = observed.manifest.get("spec") or {}
    live = live_workload(observed)
    workload = None if live is None else live[1]
    desired = plan.replicas
    if plan.accepted.holds is False and workload is not None:
        desired = replicas_of(workload)
    alive = [pod for pod in observed.pods if not is_ending(pod) and not is_over(pod)]
    leaders = [pod for pod in alive if label_of(pod, WORKER_INDEX_LABEL) in (None, "0")]
    service = _find_service(observed)
    revision = plan.revision or (label_of(workload, LABEL_REVISION) if workload is not None else None)
    current = [pod for pod in alive if label_of(pod, LABEL_REVISION) == revision]
    num_current = sum(label_of(pod, LABEL_REVISION) == revision for pod in leaders)
    is_short = num_current < max(desired, replicas_of(workload) if workload is not None else 0)
    is_template_current = workload is not None and label_of(workload, LABEL_REVISION) == plan.revision
    # A pod that is over was replaced already; what ended it matters only where nothing came after it.
    judged = alive or list(observed.pods)
    problems = {pod["metadata"]["name"]: find_pod_problem(pod, observed.warnings, observed.at) for pod in judged}
    return Situation(
        desired=desired,
        is_suspended=bool(spec.get("suspend")),
        num_live=len(leaders),
        num_ready=sum(map(is_ready, leaders)),
        num_reached=len(reached_pods(service, leaders)),
        num_ending=sum(map(is_ending, observed.pods)),
        num_old=len(leaders) - num_current,
        has_service=service is not None,
        is_template_current=is_template_current,
        is_rolled_out=is_template_current and len(leaders) == num_current and _is_rolled_out(observed, plan, workload),
        is_deadline_exceeded=is_deadline_exceeded(workload),
        are_all_scheduled=all(map(is_scheduled, alive)),
        is_job_running=any(map(is_running, pods_of_job(observed))),
        running_init=next(filter(None, map(running_init_container, alive)), ""),
        is_pod_started=any(map(is_running, alive)),
        model_problem=_find_model_problem(observed, plan.model_cached, cluster),
        workload_problem=find_workload_problem(
            workload,
            is_short_of_pods=is_short,
            is_rolling=num_current < len(leaders) or not leaders,
            subject=Subject.SERVER_OF_PROFILE if "profile" in spec or "profiles" in spec else Subject.SERVER,
        ),
        pod_problem=_worst(problems.values()),
        current_problem=_worst(problems.get(pod["metadata"]["name"]) for pod in current),
        scheduling_problem=_worst(one for one in problems.values() if one and one.stage is Stage.SCHEDULING),
        restarts=_describe_restarts(alive, observed.warnings),
        download_line=describe_download(observed.progress),
        loading_line=_describe_loading(observed, alive),
    )


def _worst(found: Any) -> Finding | None:
    return min((finding for finding in found if finding is not None), default=None)


def _find_service(observed: Observed) -> Manifest | None:
    """Return the Service that clients call: the one of its name that this LLMDeployment owns."""
    metadata = observed.manifest["metadata"]
    name = names.service_name(metadata["name"])
    return observed.children.get(Ref(kind=SERVICE, namespace=metadata["namespace"], name=name))


def _is_rolled_out(observed: Observed, plan: Plan, workload: Manifest | None) -> bool:
    """Whether the template reached its pods. A pod that fails later does not undo a rollout."""
    if is_rollout_complete(observed, plan.revision, plan.replicas):
        return True
    if workload is None:
        return False
    progressing = condition_of(workload, "Progressing") or {}
    generation = workload["metadata"].get("generation", 0)
    is_about_this = (workload.get("status") or {}).get("observedGeneration", 0) >= generation
    return bool(is_about_this and progressing.get("reason") == "NewReplicaSetAvailable")


def _find_model_problem(observed: Observed, verdict: Verdict, cluster: ClusterFacts) -> Finding | None:
    """Tell why the model is not in its volume: what keeps a pod from trying, else what the plan made of the tries."""
    volume_problem = find_volume_problem(observed.volume, observed.warnings, cluster)
    if verdict.holds is True:
        return volume_problem if volume_problem is not None and volume_problem.reason == VOLUME_LOST else None
    if verdict.holds is None:
        return volume_problem
    is_named = verdict.reason in (SECRET_MISSING, CONFIG_MAP_MISSING)
    if not is_named and (obstacle := volume_problem or _find_job_obstacle(observed)) is not None:
        return obstacle
    if verdict.reason in PROGRESS_REASONS:
        return None
    detail, is_final = verdict.message, verdict.reason != model_facts.SOURCE_UNREACHABLE
    model = (observed.manifest.get("spec") or {}).get("model") or {}
    if verdict.reason == model_facts.MODEL_GATED and not model.get("tokenSecretRef"):
        detail = "set spec.model.tokenSecretRef"
    elif verdict.reason == NO_DEFAULT_STORAGE_CLASS:
        detail = STORAGE_CLASS_CURE
    return Finding(stage=Stage.MODEL, reason=verdict.reason, detail=detail, is_final=is_final)


def _find_job_obstacle(observed: Observed) -> Finding | None:
    """Return what keeps the download's newest pod from running. How tries ended, the plan knows."""
    newest = next(reversed(pods_of_job(observed)), None)
    if newest is None:
        return find_job_refusal(observed.job, observed.warnings)
    if is_over(newest):
        return None
    found = find_pod_problem(newest, observed.warnings, observed.at)
    is_obstacle = found is not None and found.stage is not Stage.PROCESS and found.reason != VOLUME_NOT_BOUND
    return found if is_obstacle else None


def _describe_restarts(pods: Sequence[Manifest], warnings: Sequence[WarningEvent]) -> str:
    told = []
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        count, cause = restart_count(pod), find_restart_cause(pod, warnings)
        if count and cause is not None:
            times = "once" if count == 1 else f"{count} times"
            told.append(f"{pod['metadata']['name']} was restarted {times}, last for {cause.line}")
    return "; ".join(told)


def describe_download(progress: DownloadProgress | None) -> str:
    """Return `Downloading: 42 % at 31 MB/s, 2 min left`."""
    if progress is None:
        return DOWNLOADING
    if progress.total_bytes:
        text = f"{_percent(progress.done_bytes, progress.total_bytes):.0f} %"
    else:
        text = format_bytes(progress.done_bytes)
    if progress.bytes_per_second:
        text += f" at {progress.bytes_per_second / 1e6:.3g} MB/s"
    if progress.eta_seconds is not None:
        text += f", {describe_seconds(progress.eta_seconds)} left"
    return reason_line(DOWNLOADING, f"{text}; {progress.message}" if progress.message else text)


def _percent(done: int, total: int) -> float:
    return min(100.0, 100.0 * done / total)


def describe_seconds(seconds: float) -> str:
    """Return a duration as people say it: `40 s`, `2 min`, `3 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _describe_loading(observed: Observed, pods: Sequence[Manifest]) -> str:
    """Say how far the pod is that is nearest to ready."""
    order = list(Phase)
    said = [
        readiness
        for pod in pods
        if not is_ready(pod) and (readiness := observed.readiness.get(pod["metadata"]["name"])) is not None
    ]
    if not said and any(map(has_started, pods)):
        return "Unready: the server was ready, and does not answer now"
    if not said:
        return f"{LOADING}: the server is starting"
    best = max(said, key=lambda one: (order.index(one.phase), one.percent or 0.0, one.message))
    told = f"{best.percent:.0f} %" if best.percent is not None else ""
    if best.eta_seconds is not None:
        told = f"{told}, {describe_seconds(best.eta_seconds)} left".lstrip(", ")
    return reason_line(best.phase.value, told or best.message)
