"""The whole `.status` of an LLMDeployment, from what was observed and what was planned.

Pure: the only clock in it are the times of transitions, which are kept while nothing changes, so that the same inputs
give an equal status at any later moment and nothing is written. Writes only what `crds/llmdeployment.yaml` describes.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from quire_contract import names
from quire_contract.memory.fit import FitReport
from quire_contract.model_facts import DownloadProgress
from quire_kube.times import format_time
from quire_operator.plan.actions import Plan
from quire_operator.plan.cache.download_pods import pods_of_job
from quire_operator.spec.settings import Settings
from quire_operator.status.cold_start import derive_cold_start
from quire_operator.status.conditions import (
    NOT_ACCEPTED,
    PAUSED,
    PAUSED_MESSAGE,
    PENDING,
    READY,
    ROLLOUT_BLOCKED,
    ROLLOUT_COMPLETE,
    ROLLOUT_FAILED,
    SCALED_TO_ZERO,
    SERVICE_MISLED,
    SUSPENDED,
    Condition,
    find_worst,
    judge,
    write_conditions,
)
from quire_operator.status.reasons import Stage, as_line, reason_line
from quire_operator.status.situation import DOWNLOADING, LOADING, Situation, look
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed
from quire_operator.watch.store import model_place

MAX_COLUMN_LENGTH: Final = 200
"""Of `status.reason`, which is a column of `kubectl get llm`; the conditions have all of it."""

DRAINING: Final = "Draining"
UPDATING: Final = "Updating"
FAILED: Final = "Failed"

_CAMEL_FIT: Final = {
    "fits": "fits",
    "need_bytes": "needBytes",
    "have_bytes": "haveBytes",
    "weights_bytes": "weightsBytes",
    "workspace_bytes": "workspaceBytes",
    "kv_bytes_per_token": "kvBytesPerToken",
    "kv_capacity_tokens": "kvCapacityTokens",
    "max_concurrent_sequences": "maxConcurrentSequences",
    "max_model_len": "maxModelLen",
}


def derive_status(
    observed: Observed, plan: Plan, cluster: ClusterFacts, settings: Settings, now: float
) -> dict[str, Any]:
    """Return the status as it should be written now."""
    metadata = observed.manifest["metadata"]
    name, namespace = metadata["name"], metadata.get("namespace", "default")
    generation = int(metadata.get("generation", 0))
    old: Mapping[str, Any] = observed.manifest.get("status") or {}
    situation = look(observed, plan, cluster)
    conditions = judge(situation, plan, routes_through_gateway=settings.routes_through_gateway)
    by_type = {condition.type: condition for condition in conditions}
    status: dict[str, Any] = {
        "observedGeneration": generation,
        "phase": _phase(situation, plan, by_type),
        "reason": as_line(_reason(situation, plan, by_type), MAX_COLUMN_LENGTH),
        "replicas": situation.num_live,
        "readyReplicas": situation.num_ready,
        "pendingReplicas": situation.num_live - situation.num_ready,
        "selector": names.selector_string(name),
        "endpoint": names.endpoint(name, namespace),
        "model": _model(observed, plan, old),
        "cache": _cache(observed, plan, old),
        "fit": _fit(plan.fit),
        "scaling": {"desired": situation.desired, "reason": _scaling_reason(situation, plan)},
        "activeProfile": _active_profile(plan, old, now),
        "rolloutWaitingSince": _waiting_since(plan, old, now),
        "coldStart": derive_cold_start(old.get("coldStart"), observed.pods, observed.job, pods_of_job(observed)),
        "conditions": write_conditions(conditions, old, generation, now),
    }
    return {key: value for key, value in status.items() if value is not None}


def _phase(situation: Situation, plan: Plan, by_type: Mapping[str, Condition]) -> str:
    has_pods = situation.num_live > 0 or situation.num_ending > 0
    if situation.is_suspended:
        return DRAINING if has_pods else SUSPENDED
    if situation.desired == 0 and has_pods and plan.accepted.holds is not False:
        return DRAINING
    if situation.is_serving:
        is_same = by_type[ROLLOUT_COMPLETE].reason == NOT_ACCEPTED or by_type[ROLLOUT_COMPLETE].holds
        return READY if is_same or not _is_updating(situation) else UPDATING
    worst = find_worst(situation, plan)
    is_trying_again = worst is not None and worst.stage is Stage.PROCESS and situation.is_pod_started
    if plan.accepted.holds is False or (worst is not None and worst.is_final and not is_trying_again):
        return FAILED
    if plan.model_cached.holds is not True:
        return DOWNLOADING if situation.is_job_running and worst is None else PENDING
    if situation.desired == 0:
        return PENDING if worst is not None else SCALED_TO_ZERO
    return LOADING if situation.is_pod_started else PENDING


def _is_updating(situation: Situation) -> bool:
    """Whether pods serve that are not, or not all, what is wanted; a first rollout is no update."""
    return situation.num_old > 0 or not situation.is_template_current


def _reason(situation: Situation, plan: Plan, by_type: Mapping[str, Condition]) -> str:
    """Return `status.reason`: the worst thing, or what it does while it comes up, or nothing."""
    if plan.accepted.holds is False:
        return reason_line(plan.accepted.reason, plan.accepted.message)
    ready, rollout = by_type[READY], by_type[ROLLOUT_COMPLETE]
    if situation.is_suspended:
        return reason_line(SUSPENDED, ready.message)
    worst = find_worst(situation, plan)
    if ready.holds:
        is_stuck = rollout.reason in (ROLLOUT_BLOCKED, ROLLOUT_FAILED)
        if is_stuck and _is_updating(situation):
            return reason_line(rollout.reason, rollout.message)
    if plan.is_paused and worst is None and ready.reason != SERVICE_MISLED:
        return reason_line(PAUSED, PAUSED_MESSAGE)
    if ready.holds:
        return worst.line if worst is not None else ""
    return worst.line if worst is not None else _progress_line(situation, plan, ready)


def _progress_line(situation: Situation, plan: Plan, ready: Condition) -> str:
    if ready.reason == DOWNLOADING:
        return situation.download_line
    if ready.reason == LOADING:
        return situation.loading_line
    if ready.reason == PENDING and plan.model_cached.holds is not True and plan.model_cached.message:
        return reason_line(plan.model_cached.reason, plan.model_cached.message)
    return reason_line(ready.reason, ready.message)


def _model(observed: Observed, plan: Plan, old: Mapping[str, Any]) -> dict[str, Any] | None:
    if plan.accepted.holds is False:
        kept: dict[str, Any] | None = old.get("model")
        return kept
    model: dict[str, Any] = {}
    if plan.facts is not None:
        model["bytes"] = plan.facts.bytes
        if plan.facts.revision is not None:
            model["revision"] = plan.facts.revision
    if observed.progress is not None and plan.model_cached.holds is not True:
        model["download"] = _download(observed.progress)
    return model or None


def _cache(observed: Observed, plan: Plan, old: Mapping[str, Any]) -> dict[str, Any] | None:
    if plan.accepted.holds is False:
        kept: dict[str, Any] | None = old.get("cache")
        return kept
    place = model_place(observed.manifest)
    if place is None:
        return None
    capacity = ((observed.volume or {}).get("status") or {}).get("capacity") or {}
    size = {"size": capacity["storage"]} if "storage" in capacity else {}
    return {"claimName": place.claim, **size}


def _download(progress: DownloadProgress) -> dict[str, Any]:
    download: dict[str, Any] = {"doneBytes": progress.done_bytes}
    if progress.total_bytes:
        download["totalBytes"] = progress.total_bytes
        download["percent"] = round(min(100.0, 100.0 * progress.done_bytes / progress.total_bytes), 1)
    if progress.bytes_per_second is not None:
        download["bytesPerSecond"] = round(progress.bytes_per_second)
    if progress.eta_seconds is not None:
        download["etaSeconds"] = float(round(progress.eta_seconds))
    if progress.message:
        download["message"] = progress.message
    return download


def _fit(fit: FitReport | None) -> dict[str, Any] | None:
    return None if fit is None else {_CAMEL_FIT[key]: value for key, value in asdict(fit).items()}


def _scaling_reason(situation: Situation, plan: Plan) -> str:
    if situation.is_suspended:
        return SUSPENDED
    return plan.autoscaling.reason if plan.autoscaling.holds else "as spec.replicas says"


def _active_profile(plan: Plan, old: Mapping[str, Any], now: float) -> dict[str, Any] | None:
    if plan.profile is None:
        return None
    before: dict[str, Any] = old.get("activeProfile") or {}
    is_same = before.get("name") == plan.profile and "since" in before
    return {"name": plan.profile, "since": before["since"] if is_same else format_time(now)}


def _waiting_since(plan: Plan, old: Mapping[str, Any], now: float) -> str | None:
    return (old.get("rolloutWaitingSince") or format_time(now)) if plan.rollout_waiting else None
