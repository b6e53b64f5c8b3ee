"""The nine conditions of an LLMDeployment: what each says in a given situation, and how they are written.

Owns the words (types, reasons) and the upkeep that Kubernetes asks for: `lastTransitionTime` moves only with `status`.
While a spec is refused, what is said of the pods is still about the last accepted generation, and keeps its number, so
that `kubectl wait --for=condition=Ready` does not take the old pods' word for the new spec.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quire_contract import names
from quire_kube.times import format_time
from quire_operator.plan.actions import Plan, Verdict
from quire_operator.status.reasons import ROLLOUT_DEADLINE_EXCEEDED, Finding, Stage, as_line, as_reason
from quire_operator.status.situation import DOWNLOADING, LOADING, Situation

ACCEPTED: Final = "Accepted"
MODEL_CACHED: Final = "ModelCached"
FITS: Final = "Fits"
SCHEDULED: Final = "Scheduled"
LOADED: Final = "Loaded"
SERVICE_READY: Final = "ServiceReady"
AUTOSCALING_ACTIVE: Final = "AutoscalingActive"
ROLLOUT_COMPLETE: Final = "RolloutComplete"
READY: Final = "Ready"
CONDITION_TYPES: Final = (
    ACCEPTED,
    MODEL_CACHED,
    FITS,
    SCHEDULED,
    LOADED,
    SERVICE_READY,
    AUTOSCALING_ACTIVE,
    ROLLOUT_COMPLETE,
    READY,
)

SUSPENDED: Final = "Suspended"
PAUSED: Final = "Paused"
PAUSED_MESSAGE: Final = f"{names.ANNOTATION_PAUSED} is true: nothing is changed or healed until it is removed"
SCALED_TO_ZERO: Final = "ScaledToZero"
ROLLOUT_BLOCKED: Final = "RolloutBlocked"
ROLLOUT_FAILED: Final = "RolloutFailed"
RESTARTED: Final = "Restarted"
PENDING: Final = "Pending"
NOT_ACCEPTED: Final = "NotAccepted"
PROGRESSING: Final = "Progressing"
MAX_MESSAGE_LENGTH: Final = 4096

SERVICE_MISLED: Final = "ServiceMisled"
_MISLED_MESSAGE: Final = (
    "The Service's selector or port does not lead to the ready pods; undo what was edited, or delete the Service: it is"
    " made again"
)
_STATUS: Final = {True: "True", False: "False", None: "Unknown"}
_SUSPENDED_MESSAGE: Final = "spec.suspend is true; set it to false to serve"
_ZERO_UNANSWERED: Final = (
    "No replicas are wanted, and no gateway holds requests until one is there; set spec.replicas to at least 1"
)
_SURGE_CURE: Final = "free what it asks for, or set spec.rollout.strategy to Replace"
_NOT_BESIDE_VOLUME: Final = "didn't match pod affinity rules"
"""What the scheduler says where pods must stay on the node that their volume is attached to."""
_ONE_NODE_CURE: Final = (
    "free what it asks for on the node that the ReadWriteOnce volume is attached to, or use a volume with"
    " spec.cache.accessMode ReadWriteMany"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One condition, before it is compared with its predecessor."""

    type: str
    holds: bool | None
    reason: str
    message: str


def find_condition(status: Mapping[str, Any] | None, type_: str) -> Mapping[str, Any]:
    """Return one condition of a status; empty where there is none."""
    listed: Sequence[Mapping[str, Any]] = (status or {}).get("conditions") or ()
    return next((condition for condition in listed if condition.get("type") == type_), {})


def write_conditions(
    conditions: Sequence[Condition], old_status: Mapping[str, Any], generation: int, now: float
) -> list[dict[str, Any]]:
    """Return `status.conditions`."""
    is_refused = any(condition.type == ACCEPTED and condition.holds is False for condition in conditions)
    written = []
    for condition in conditions:
        old = find_condition(old_status, condition.type)
        if is_refused and condition.holds is None and old and condition.type in (MODEL_CACHED, FITS):
            written.append(dict(old))
            continue
        keeps_generation = is_refused and condition.type not in (ACCEPTED, ROLLOUT_COMPLETE)
        status = _STATUS[condition.holds]
        is_same = old.get("status") == status and old.get("lastTransitionTime")
        written.append(
            {
                "type": condition.type,
                "status": status,
                "observedGeneration": old.get("observedGeneration", generation) if keeps_generation else generation,
                "lastTransitionTime": old["lastTransitionTime"] if is_same else format_time(now),
                "reason": as_reason(condition.reason),
                "message": as_line(condition.message, MAX_MESSAGE_LENGTH),
            }
        )
    return written


def judge(situation: Situation, plan: Plan, *, routes_through_gateway: bool) -> tuple[Condition, ...]:
    """Return the nine conditions, in their order."""
    return (
        _judge_accepted(plan.accepted),
        _judge_model_cached(situation, plan.model_cached),
        _from_verdict(FITS, plan.fits),
        _judge_scheduled(situation, plan),
        _judge_loaded(situation, plan),
        _judge_service(situation, routes_through_gateway),
        _from_verdict(AUTOSCALING_ACTIVE, plan.autoscaling),
        judge_rollout(situation, plan),
        _judge_ready(situation, plan, routes_through_gateway),
    )


def _from_verdict(type_: str, verdict: Verdict) -> Condition:
    return Condition(type=type_, holds=verdict.holds, reason=verdict.reason, message=verdict.message)


def _judge_accepted(verdict: Verdict) -> Condition:
    if verdict.holds and not verdict.message:
        return Condition(type=ACCEPTED, holds=True, reason=verdict.reason, message="The spec can be carried out")
    return _from_verdict(ACCEPTED, verdict)


def _from_finding(type_: str, finding: Finding) -> Condition:
    return Condition(type=type_, holds=False, reason=finding.reason, message=finding.detail)


def _judge_model_cached(situation: Situation, verdict: Verdict) -> Condition:
    problem = situation.model_problem
    if problem is not None and not (problem.reason == verdict.reason and verdict.message):
        return _from_finding(MODEL_CACHED, problem)
    return _from_verdict(MODEL_CACHED, verdict)


def find_gate_problem(situation: Situation, plan: Plan) -> Finding | None:
    """Return what keeps the workload from being made or changed, where the spec itself is accepted."""
    if plan.accepted.holds is False:
        return None
    if situation.model_problem is not None:
        return situation.model_problem
    if plan.fits.holds is False:
        return Finding(stage=Stage.MODEL, reason=plan.fits.reason, detail=plan.fits.message, is_final=True)
    return None


def find_worst(situation: Situation, plan: Plan) -> Finding | None:
    """Return the one thing to say of everything that is wrong."""
    return find_gate_problem(situation, plan) or situation.workload_problem or situation.pod_problem


def _no_pods(type_: str, situation: Situation, plan: Plan) -> Condition:
    """Say why there is no pod: none is wanted, or none can be made yet."""
    if situation.is_suspended or (situation.desired == 0 and plan.accepted.holds is not False):
        reason = SUSPENDED if situation.is_suspended else SCALED_TO_ZERO
        return Condition(type=type_, holds=None, reason=reason, message="No pod is wanted")
    if plan.accepted.holds is False:
        reason, message = NOT_ACCEPTED, "No pod is made from a spec that is not accepted"
    elif plan.model_cached.holds is not True:
        reason, message = "WaitingForModel", "No pod is made before the model is in its volume"
    elif plan.fits.holds is False:
        reason, message = "DoesNotFit", "No pod is made for a model that does not fit"
    else:
        reason, message = "NoPods", "The pods are being made"
    return Condition(type=type_, holds=None, reason=reason, message=message)


def _judge_scheduled(situation: Situation, plan: Plan) -> Condition:
    if situation.workload_problem is not None:
        return _from_finding(SCHEDULED, situation.workload_problem)
    if situation.scheduling_problem is not None:
        return _from_finding(SCHEDULED, situation.scheduling_problem)
    if situation.num_live == 0:
        return _no_pods(SCHEDULED, situation, plan)
    if not situation.are_all_scheduled:
        return Condition(type=SCHEDULED, holds=None, reason=PENDING, message="The scheduler has not said where yet")
    return Condition(type=SCHEDULED, holds=True, reason=SCHEDULED, message="All pods have a node")


def _judge_loaded(situation: Situation, plan: Plan) -> Condition:
    if situation.num_live == 0:
        if situation.pod_problem is not None and situation.pod_problem.stage is not Stage.SCHEDULING:
            return _from_finding(LOADED, situation.pod_problem)
        return _no_pods(LOADED, situation, plan)
    if situation.num_ready >= max(situation.desired, 1) and situation.num_ready == situation.num_live:
        if situation.restarts:
            return Condition(type=LOADED, holds=True, reason=RESTARTED, message=situation.restarts)
        return Condition(type=LOADED, holds=True, reason=LOADED, message="All replicas have the model in memory")
    if situation.pod_problem is not None and situation.pod_problem.stage is not Stage.SCHEDULING:
        return _from_finding(LOADED, situation.pod_problem)
    if situation.scheduling_problem is not None:
        return Condition(type=LOADED, holds=False, reason=PENDING, message="A pod has no node yet: see Scheduled")
    message = f"{situation.num_ready} of {situation.desired} replicas have the model in memory"
    return Condition(type=LOADED, holds=False, reason=LOADING, message=message)


def _judge_service(situation: Situation, routes_through_gateway: bool) -> Condition:
    if not situation.has_service:
        message = "The Service is not there yet; the operator makes it"
        return Condition(type=SERVICE_READY, holds=False, reason="ServiceMissing", message=message)
    if situation.is_serving:
        message = "The Service leads to " + _count(situation.num_reached, "ready replica")
        return Condition(type=SERVICE_READY, holds=True, reason=SERVICE_READY, message=message)
    if routes_through_gateway and not situation.is_suspended:
        message = "The gateway answers, and holds requests until a replica is ready"
        return Condition(type=SERVICE_READY, holds=True, reason="Gateway", message=message)
    if situation.num_ready:
        return Condition(type=SERVICE_READY, holds=False, reason=SERVICE_MISLED, message=_MISLED_MESSAGE)
    message = "The Service leads to no ready pod"
    return Condition(type=SERVICE_READY, holds=False, reason="NoEndpoints", message=message)


def judge_rollout(situation: Situation, plan: Plan) -> Condition:
    """Tell whether what is wanted is what runs; if not, what stops it."""
    if plan.is_paused:
        is_done = situation.is_rolled_out and not plan.num_withheld
        message = f"{PAUSED_MESSAGE}; {_count(plan.num_withheld, 'write')} held back"
        return Condition(type=ROLLOUT_COMPLETE, holds=is_done, reason=PAUSED, message=message)
    if plan.accepted.holds is False:
        message = "The spec is not accepted: see Accepted. What ran before goes on"
        return Condition(type=ROLLOUT_COMPLETE, holds=False, reason=NOT_ACCEPTED, message=message)
    gate = find_gate_problem(situation, plan)
    if gate is not None:
        return _blocked(gate.line)
    if plan.model_cached.holds is not True:
        message = "Pods change when the model is in its volume"
        return Condition(type=ROLLOUT_COMPLETE, holds=False, reason="WaitingForModel", message=message)
    if plan.rollout_waiting:
        message = "The old pods finish their requests first, for at most spec.rollout.waitForIdle"
        return Condition(type=ROLLOUT_COMPLETE, holds=False, reason="WaitingForIdle", message=message)
    if situation.is_rolled_out:
        message = "All replicas are of the wanted template"
        return Condition(type=ROLLOUT_COMPLETE, holds=True, reason="Complete", message=message)
    if situation.is_template_current and situation.workload_problem is not None:
        return _blocked(situation.workload_problem.line)
    current = situation.current_problem if situation.is_template_current else None
    if current is not None and current.stage is Stage.SCHEDULING:
        return _blocked("; ".join((current.detail, *_cures(current, situation))))
    if current is not None:
        message = f"{current.line}; the old pods go on serving" if situation.num_old else current.line
        return Condition(type=ROLLOUT_COMPLETE, holds=False, reason=ROLLOUT_FAILED, message=message)
    if situation.is_template_current and situation.is_deadline_exceeded:
        message = f"{ROLLOUT_DEADLINE_EXCEEDED}: the new pods were not ready in time; see spec.rollout.progressDeadline"
        return Condition(type=ROLLOUT_COMPLETE, holds=False, reason=ROLLOUT_FAILED, message=message)
    message = f"{_count(situation.num_old, 'replica')} of an older template left" if situation.num_old else ""
    message = message or f"{situation.num_ready} of {_count(situation.desired, 'replica')} ready"
    return Condition(type=ROLLOUT_COMPLETE, holds=False, reason=PROGRESSING, message=message)


def _cures(unscheduled: Finding, situation: Situation) -> tuple[str, ...]:
    if _NOT_BESIDE_VOLUME in unscheduled.detail:
        return (f"{_ONE_NODE_CURE}, or set spec.rollout.strategy to Replace" if situation.num_old else _ONE_NODE_CURE,)
    return (_SURGE_CURE,) if situation.num_old else ()


def _blocked(message: str) -> Condition:
    return Condition(type=ROLLOUT_COMPLETE, holds=False, reason=ROLLOUT_BLOCKED, message=message)


def _judge_ready(situation: Situation, plan: Plan, routes_through_gateway: bool) -> Condition:
    if situation.is_suspended:
        return Condition(type=READY, holds=False, reason=SUSPENDED, message=_SUSPENDED_MESSAGE)
    if situation.is_serving:
        message = f"{situation.num_reached} of {_count(situation.desired, 'replica')} ready"
        return Condition(type=READY, holds=True, reason="Serving", message=message)
    if plan.accepted.holds is False:
        return _from_verdict(READY, plan.accepted)
    worst = find_worst(situation, plan)
    if worst is not None:
        return _from_finding(READY, worst)
    if plan.model_cached.holds is not True:
        reason = DOWNLOADING if situation.is_job_running else PENDING
        message = "The model is being downloaded" if situation.is_job_running else "The model is not in its volume yet"
        return Condition(type=READY, holds=False, reason=reason, message=message)
    if situation.desired == 0:
        if routes_through_gateway and situation.has_service:
            message = "No replicas are wanted; the gateway wakes the model when it is asked"
            return Condition(type=READY, holds=True, reason=SCALED_TO_ZERO, message=message)
        return Condition(type=READY, holds=False, reason=SCALED_TO_ZERO, message=_ZERO_UNANSWERED)
    if situation.num_ready:
        service = _judge_service(situation, routes_through_gateway=False)
        return Condition(type=READY, holds=False, reason=service.reason, message=service.message)
    if situation.is_pod_started:
        return Condition(type=READY, holds=False, reason=LOADING, message="The server loads the model")
    has_node = situation.num_live > 0 and situation.are_all_scheduled
    message = "A pod has a node; its image is pulled or its volume mounted" if has_node else "The pods are being made"
    if situation.running_init:
        message = f"Init container {situation.running_init} runs; the server starts when it has ended"
    return Condition(type=READY, holds=False, reason=PENDING, message=message)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
