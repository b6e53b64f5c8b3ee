"""What to do about one LLMDeployment: a pure function from what is observed to the writes to make.

Order of the actions: the number of replicas, the volume and the Job, the small children, the workload, and last what
is no longer wanted. The workload is made and changed only while its gate is open: the spec is accepted, the model is in
its volume, and it is not known not to fit. While the gate is closed, a workload that is there goes on serving and gets
only its replicas. Where another kind of workload is wanted, the old one serves until the new one can. Invariants: the
same input gives the same plan; a plan that has been carried out leaves nothing to plan; a refused spec gives no
action, nor does one that a person has paused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from quire_contract.model_facts import ModelFacts
from quire_contract.names import ANNOTATION_APPLIED_HASH, ANNOTATION_LOAD_BUDGET, LABEL_REVISION
from quire_kube.objects import Kind, Manifest, Ref, annotation_of, label_of
from quire_operator.plan.acceptance import Accepted, RefusedError, accept, read_manifest
from quire_operator.plan.actions import Action, Apply, Delete, Plan, SetReplicas, Verdict
from quire_operator.plan.cache.downloads import CachePlan, plan_cache
from quire_operator.plan.drift import describe_changes, describe_drift, is_applied
from quire_operator.plan.fit import Fit, judge_fit, target_pending_per_replica
from quire_operator.plan.hardware import Hardware, pods_per_replica
from quire_operator.plan.pause import is_paused, withhold
from quire_operator.plan.profiles import ProfileChoice, choose_profile
from quire_operator.plan.resources.render import render_children
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.plan.resources.volume import access_modes_of
from quire_operator.plan.rollout import (
    Hold,
    earliest,
    hold_for_idle,
    live_workload,
    live_workloads,
    predecessor_of,
    prepare_scale_down,
    ready_replicas_of,
    replicas_of,
)
from quire_operator.spec.kinds import (
    DEPLOYMENT,
    LEADER_WORKER_SET,
    LLM_DEPLOYMENT,
    NETWORK_POLICY,
    SCALED_OBJECT,
    SERVICE,
    WORKLOAD_KINDS,
    ref_of,
)
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import Settings
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed
from quire_operator.watch.pods import is_ending

MIN_LOAD_BUDGET_S: Final = 600.0
_SLOWEST_START_FACTOR: Final = 3
_SLOW_DISK_BYTES_PER_S: Final = 50_000_000
_SLOW_DISK_FACTOR: Final = 2
_NOT_ASKED: Final = Verdict(holds=None, reason="NotAccepted", message="The spec is not accepted.")


def plan(observed: Observed, cluster: ClusterFacts, settings: Settings, now: float) -> Plan:
    """Return what to do now, and what was decided on the way; nothing to do while a person holds everything."""
    if settings.openshift is None:
        settings = msgspec.structs.replace(settings, openshift=cluster.is_openshift)
    decided = _decide(observed, cluster, settings, now)
    return withhold(decided) if is_paused(observed.manifest) else decided


def _decide(observed: Observed, cluster: ClusterFacts, settings: Settings, now: float) -> Plan:
    try:
        accepted = accept(observed, cluster, settings)
    except RefusedError as refusal:
        return _refused(observed, refusal.verdict)
    deployment = accepted.deployment
    # Before the model is there, no profile is known not to fit.
    download_on = choose_profile(deployment, settings, observed, candidates=deployment.spec.profiles, now=now).name
    model = plan_cache(
        deployment,
        observed,
        cluster,
        settings,
        source=accepted.source,
        hardware=accepted.hardware_by_profile[download_on],
        now=now,
    )
    fits = _judge_fits(accepted, model.facts)
    choice = _choose(accepted, settings, observed, fits, now)
    replicas, seeds = _plan_replicas(deployment)
    context = _Context(
        accepted=accepted,
        observed=observed,
        cluster=cluster,
        settings=settings,
        hardware=accepted.hardware_by_profile[choice.name],
        facts=model.facts,
        replicas=replicas,
        target=target_pending_per_replica(deployment, accepted.engine, fits[choice.name].report),
        now=now,
    )
    is_open = model.verdict.holds is True and fits[choice.name].verdict.holds is not False
    workload = _plan_workload(context) if is_open else _keep_workload(context)
    return Plan(
        actions=(*seeds, *model.actions, *workload.actions),
        accepted=Verdict(holds=True, reason="Accepted"),
        model_cached=model.verdict,
        fits=_fit_verdict(fits[choice.name], model),
        autoscaling=_judge_autoscaling(deployment, cluster, settings),
        replicas=replicas,
        profile=choice.name,
        facts=model.facts,
        fit=fits[choice.name].report,
        revision=workload.revision,
        needs_loads=workload.needs_loads,
        requeue_after_s=earliest(model.requeue_after_s, choice.requeue_after_s, workload.hold.requeue_after_s),
        rollout_waiting=workload.hold.is_held,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """What has been decided before the children."""

    accepted: Accepted
    observed: Observed
    cluster: ClusterFacts
    settings: Settings
    hardware: Hardware
    facts: ModelFacts | None
    replicas: int
    target: int
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Children:
    """What to do about the objects that the LLMDeployment owns."""

    actions: tuple[Action, ...]
    revision: str | None = None
    needs_loads: bool = False
    hold: Hold = Hold()  # noqa: RUF009 - frozen


def _refused(observed: Observed, verdict: Verdict) -> Plan:
    is_claim = verdict.reason == "ClaimMissing"
    live, deployment = live_workload(observed), read_manifest(observed.manifest)
    wanted = 0 if deployment is None else _plan_replicas(deployment)[0]
    return Plan(
        accepted=verdict,
        model_cached=verdict if is_claim else _NOT_ASKED,
        fits=_NOT_ASKED,
        autoscaling=_NOT_ASKED,
        replicas=wanted if live is None else replicas_of(live[1]),
    )


def _judge_fits(accepted: Accepted, facts: ModelFacts | None) -> dict[str | None, Fit]:
    by_profile = accepted.hardware_by_profile.items()
    return {name: judge_fit(accepted.engine, hardware, facts) for name, hardware in by_profile}


def _choose(
    accepted: Accepted, settings: Settings, observed: Observed, fits: dict[str | None, Fit], now: float
) -> ProfileChoice:
    profiles = accepted.deployment.spec.profiles
    candidates = [name for name in profiles if fits[name].verdict.holds is not False] or list(profiles)
    return choose_profile(accepted.deployment, settings, observed, candidates=candidates, now=now)


def _plan_replicas(deployment: LLMDeployment) -> tuple[int, tuple[SetReplicas, ...]]:
    """Return how many replicas there should be, and the write that says so where nobody has said yet."""
    spec = deployment.spec
    wanted = max(spec.scaling.min, 1) if spec.replicas is None else spec.replicas
    seeds: tuple[SetReplicas, ...] = ()
    if spec.replicas is None:
        ref = Ref(kind=LLM_DEPLOYMENT, namespace=deployment.namespace, name=deployment.name)
        seeds = (SetReplicas(ref=ref, replicas=wanted, reason="Created: the first number of replicas"),)
    return (0 if spec.suspend else wanted), seeds


def _fit_verdict(fit: Fit, model: CachePlan) -> Verdict:
    if model.facts is None and model.verdict.holds is True:
        message = "What an image holds is not known before a pod runs."
        return Verdict(holds=None, reason="ModelUnknown", message=message)
    return fit.verdict


def _judge_autoscaling(deployment: LLMDeployment, cluster: ClusterFacts, settings: Settings) -> Verdict:
    mode = deployment.spec.scaling.mode
    if mode == "Off":
        return Verdict(holds=False, reason="Disabled", message="spec.scaling.mode is Off.")
    if not settings.routes_through_gateway:
        message = "Replicas stay as spec.replicas says until the gateway routes requests, which shows the demand."
        return Verdict(holds=False, reason="NoGateway", message=message)
    if mode in ("Auto", "KEDA") and cluster.has(SCALED_OBJECT):
        if deployment.spec.suspend:
            return Verdict(holds=False, reason="Suspended", message="Scaling is paused while spec.suspend is true.")
        return Verdict(holds=True, reason="KEDA", message="KEDA scales by the demand that the gateway sees.")
    if mode == "KEDA":
        message = 'The cluster has no ScaledObject API; install KEDA, or set spec.scaling.mode to "Off".'
        return Verdict(holds=False, reason="KEDAMissing", message=message)
    message = "This version has no scaler of its own; install KEDA. Replicas stay as spec.replicas says."
    return Verdict(holds=False, reason="NoScaler", message=message)


def _plan_workload(context: _Context) -> _Children:
    """Apply all children, the workload last; or hold a changed template back until the old pods are idle.

    A workload of another kind goes on serving until this one can, but for the strategy Replace, where it goes first.
    """
    children = _render_learned(context)
    workload = next(child for child in children if ref_of(child).kind in WORKLOAD_KINDS)
    revision = label_of(workload, LABEL_REVISION)
    assert revision is not None
    observed, rollout = context.observed, context.accepted.deployment.spec.rollout
    live, predecessor = live_workload(observed), predecessor_of(observed, ref_of(workload).kind)
    scale_down = prepare_scale_down(observed, context.replicas)
    hold, is_needed = Hold(), False
    is_changed = predecessor is not None or (live is not None and label_of(live[1], LABEL_REVISION) != revision)
    if rollout.strategy == "Surge":
        is_needed = context.replicas > 0 and predecessor is not None and ready_replicas_of(predecessor[1]) > 0
    elif is_changed and context.replicas > 0:
        hold = hold_for_idle(observed, wait_s=rollout.wait_for_idle_s, revision=revision, now=context.now)
    is_kept = hold.is_held or is_needed
    small = _small_children(observed, children, predecessor if is_kept else None)
    changes: list[Action] = list(_set_live_replicas(context) if hold.is_held else _apply(observed, [workload]))
    return _Children(
        actions=(
            *_apply(observed, small),
            *(scale_down.costs if changes else ()),
            *changes,
            *_prune(observed, children, keeps_workload=is_kept),
        ),
        revision=revision,
        needs_loads=hold.needs_loads or (bool(changes) and scale_down.needs_loads),
        hold=hold,
    )


def _keep_workload(context: _Context) -> _Children:
    """Apply the small children; of a workload that is there, change only the replicas."""
    budget_s = _live_budget_s(context.observed) or load_budget_s(context.observed, context.facts)
    observed, children = context.observed, _render(context, budget_s)
    small = _small_children(observed, children, predecessor_of(observed, _wanted_kind(context)))
    changes = tuple(_set_live_replicas(context))
    scale_down = prepare_scale_down(observed, context.replicas)
    return _Children(
        actions=(
            *_apply(observed, small),
            *(scale_down.costs if changes else ()),
            *changes,
            *_prune(observed, children, keeps_workload=True),
        ),
        needs_loads=bool(changes) and scale_down.needs_loads,
    )


def _wanted_kind(context: _Context) -> Kind:
    is_several = pods_per_replica(context.accepted.deployment, context.hardware) > 1
    return LEADER_WORKER_SET if is_several else DEPLOYMENT


def _small_children(
    observed: Observed, children: Sequence[Manifest], predecessor: tuple[Ref, Manifest] | None
) -> list[Manifest]:
    """Return all but the workload, less what leads to a predecessor that goes on serving and would no longer."""
    left_alone: set[Kind] = set()
    if predecessor is not None:
        # The pods of a group talk to one another, which the policy for single pods forbids.
        left_alone = {SERVICE, NETWORK_POLICY} if predecessor[0].kind == LEADER_WORKER_SET else {SERVICE}
    refs = {ref for ref in observed.children if ref.kind in left_alone}
    return [child for child in children if ref_of(child) not in refs and ref_of(child).kind not in WORKLOAD_KINDS]


def _render_learned(context: _Context) -> tuple[Manifest, ...]:
    """Render with the load budget that the live pods have, unless the template changes anyway: learning alone rolls
    nothing out."""
    learned_s = load_budget_s(context.observed, context.facts)
    live, kept_s = live_workload(context.observed), _live_budget_s(context.observed)
    children = _render(context, learned_s)
    if live is None or kept_s is None or kept_s == learned_s:
        return children
    revisions = (label_of(child, LABEL_REVISION) for child in children if ref_of(child) == live[0])
    return _render(context, kept_s) if label_of(live[1], LABEL_REVISION) in revisions else children


def _live_budget_s(observed: Observed) -> float | None:
    live = live_workload(observed)
    text = None if live is None else annotation_of(live[1], ANNOTATION_LOAD_BUDGET)
    return float(text) if text is not None and text.isdecimal() else None


def _render(context: _Context, budget_s: float) -> tuple[Manifest, ...]:
    return render_children(
        RenderInput(
            deployment=context.accepted.deployment,
            settings=context.settings,
            cluster=context.cluster,
            hardware=context.hardware,
            claim=context.accepted.source.claim,
            facts=context.facts,
            access_modes=access_modes_of(context.observed.volume),
            replicas=context.replicas,
            load_budget_s=budget_s,
            target_pending_per_replica=context.target,
        )
    )


def load_budget_s(observed: Observed, facts: ModelFacts | None) -> float:
    """Return how long a pod may take to start: from past starts, and from the model's size on a slow disk."""
    cold_start = (observed.manifest.get("status") or {}).get("coldStart") or {}
    recent = [float(seconds) for seconds in cold_start.get("recentSeconds") or ()]
    size_bytes = facts.bytes if facts is not None else 0
    return max(
        MIN_LOAD_BUDGET_S,
        _SLOWEST_START_FACTOR * max(recent, default=0.0),
        _SLOW_DISK_FACTOR * size_bytes / _SLOW_DISK_BYTES_PER_S,
    )


def _apply(observed: Observed, documents: Sequence[Manifest]) -> Iterator[Apply]:
    """Yield the documents that differ from what is there. What is being deleted is left alone: its end is an event."""
    for document in documents:
        live = observed.children.get(ref_of(document))
        if live is None:
            yield Apply(manifest=document, reason="Created")
        elif is_ending(live) or is_applied(document, live):
            continue
        elif annotation_of(document, ANNOTATION_APPLIED_HASH) == annotation_of(live, ANNOTATION_APPLIED_HASH):
            where = describe_drift(document, live)
            yield Apply(manifest=document, reason=f"Healed: {where} was edited", is_drift=True)
        else:
            yield Apply(manifest=document, reason=f"Changed: {describe_changes(document, live)}")


def _set_live_replicas(context: _Context) -> Iterator[SetReplicas]:
    for ref, live in live_workloads(context.observed):
        if replicas_of(live) != context.replicas:
            yield SetReplicas(ref=ref, replicas=context.replicas, reason="Changed: spec.replicas")


def _prune(observed: Observed, documents: Sequence[Manifest], *, keeps_workload: bool) -> Iterator[Delete]:
    wanted = {ref_of(document) for document in documents}
    for ref, live in sorted(observed.children.items(), key=lambda item: item[0]):
        is_kept = ref in wanted or is_ending(live) or (keeps_workload and ref.kind in WORKLOAD_KINDS)
        if not is_kept:
            yield Delete(ref=ref, uid=live["metadata"]["uid"], reason="Pruned: no longer wanted")
