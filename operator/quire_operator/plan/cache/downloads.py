"""Is the model in its volume, and what has to be done that it will be: the volume, the Job, and the facts it leaves.

Facts are an annotation of the claim; while it is there the model is cached and no Job is wanted, except where another
version wrote them: the model serves, and a Job reads the files anew, once. A Job is immutable:
one that should be different is deleted, and made again when it is gone. A Job that has failed for good is made again
after a while, longer each time; the claim holds the count, because it outlives the Job. Jobs and cache volumes are
shared: where another LLMDeployment uses the same volume, a Job that is merely different is left alone while it does not
fail, and then replaced no faster than a failed one, or two of them would take turns for ever. A Job is no different for
being placed elsewhere than wanted: that matters only while its pod finds no node.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from quire_contract.model_facts import ModelFacts, decode_facts, encode_facts
from quire_contract.model_uri import parse_model_uri
from quire_contract.names import (
    ANNOTATION_APPLIED_HASH,
    ANNOTATION_ATTEMPT,
    ANNOTATION_ATTEMPT_PREFIX,
    ANNOTATION_FACTS_PREFIX,
    ANNOTATION_PLACEMENT,
    model_digest,
)
from quire_contract.units import format_bytes
from quire_kube.objects import Manifest, Ref, annotation_of
from quire_kube.times import parse_time
from quire_operator.plan.actions import Action, Annotate, Apply, Delete, Verdict
from quire_operator.plan.admission import Subject, read_refusal, strip_object
from quire_operator.plan.cache.claim_differences import CLAIM_DIFFERS
from quire_operator.plan.cache.download_pods import (
    DownloadFailure,
    describe_failure,
    find_facts,
    find_failure,
    find_obstacle,
    is_under_way,
    pods_of_job,
    unschedulable_since,
)
from quire_operator.plan.cache.retries import due_at, read_retry_at
from quire_operator.plan.cache.volumes import Source, VolumePlan, claim_ref, plan_volume
from quire_operator.plan.hardware import Hardware
from quire_operator.plan.resources.download.job import render_download_job
from quire_operator.plan.resources.volume import access_modes_of
from quire_operator.plan.rollout import earliest
from quire_operator.spec.kinds import JOB
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import Settings
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed, find_warning
from quire_operator.watch.pods import condition_of, is_ending, is_over

_RESULT_WAIT_S: Final = 10.0
"""How long a pod's result may reach the caches after the end of its Job."""
_MAX_ATTEMPT: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """Whether the model is there, and what to do about it."""

    verdict: Verdict
    facts: ModelFacts | None = None
    actions: tuple[Action, ...] = ()
    requeue_after_s: float | None = None


def plan_cache(
    deployment: LLMDeployment,
    observed: Observed,
    cluster: ClusterFacts,
    settings: Settings,
    *,
    source: Source,
    hardware: Hardware,
    now: float,
) -> CachePlan:
    """Decide about volume and download. A claim of the user's must exist (`acceptance.py` sees to it).

    `hardware` is what the model is to be served on.
    """
    if source.claim is None:
        return CachePlan(verdict=Verdict(holds=True, reason="ImageVolume", message="The model is mounted as an image."))
    facts = recorded_facts(deployment, observed.volume)
    pods = pods_of_job(observed)
    failure = find_failure(pods) if facts is None or facts.is_outdated else None
    shortage = failure.shortage if failure is not None and facts is None else None
    volume = plan_volume(deployment, observed, cluster, settings, source=source, shortage=shortage)
    if facts is not None and not (facts.is_outdated and volume.can_download):
        return _cached(facts, observed, source, volume)
    if not volume.can_download:
        assert volume.trouble is not None
        actions = _delete_job(observed.job, "Blocked: its volume is being deleted")
        return CachePlan(verdict=volume.trouble, actions=(*volume.actions, *actions), requeue_after_s=None)
    download = _Download(
        deployment=deployment,
        observed=observed,
        settings=settings,
        hardware=hardware,
        claim=source.claim,
        now=now,
        pods=pods,
        failure=failure,
        volume=volume,
    )
    planned = _plan_job(download)
    if facts is not None and planned.facts is None:
        planned = replace(planned, verdict=_cached_verdict(facts, source, volume), facts=facts)
    return replace(
        planned,
        actions=(*volume.actions, *planned.actions),
        requeue_after_s=earliest(volume.requeue_after_s, planned.requeue_after_s),
    )


def recorded_facts(deployment: LLMDeployment, volume: Manifest | None) -> ModelFacts | None:
    """Return the facts that a claim carries about the deployment's model. One that is ending can be mounted no more."""
    if volume is None or is_ending(volume):
        return None
    text = annotation_of(volume, _facts_annotation(deployment))
    return None if text is None else decode_facts(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Download:
    """All that the decision about the Job needs."""

    deployment: LLMDeployment
    observed: Observed
    settings: Settings
    hardware: Hardware
    claim: str
    now: float
    pods: Sequence[Manifest]
    failure: DownloadFailure | None
    volume: VolumePlan


def _cached(facts: ModelFacts, observed: Observed, source: Source, volume: VolumePlan) -> CachePlan:
    actions = (*volume.actions, *_delete_job(observed.job, "Done: the model is in the volume"))
    return CachePlan(verdict=_cached_verdict(facts, source, volume), facts=facts, actions=actions)


def _cached_verdict(facts: ModelFacts, source: Source, volume: VolumePlan) -> Verdict:
    message = f"{format_bytes(facts.bytes)} in PersistentVolumeClaim {source.claim}.{_noted(volume)}"
    return Verdict(holds=True, reason=CLAIM_DIFFERS if volume.note else "Cached", message=message)


def _noted(volume: VolumePlan) -> str:
    return f" {volume.note}." if volume.note else ""


def _plan_job(given: _Download) -> CachePlan:
    job = given.observed.job
    if job is None:
        return CachePlan(verdict=_progress_verdict(given), actions=(_create(given),))
    if is_ending(job):
        return CachePlan(verdict=_progress_verdict(given))
    facts = find_facts(given.pods)
    volume = given.observed.volume
    if facts is not None and volume is not None:
        annotations = {_facts_annotation(given.deployment): encode_facts(facts).decode()}
        if annotation_of(volume, _attempt_annotation(given.deployment)):
            annotations[_attempt_annotation(given.deployment)] = ""
        record = Annotate(ref=claim_ref(volume), annotations=annotations, reason="Downloaded")
        done = _cached(facts, given.observed, Source(claim=given.claim), VolumePlan())
        return replace(done, actions=(record, *done.actions))
    ended_at = _ended_at(job)
    if ended_at is None:
        return _watch_running(given, job)
    is_complete = condition_of(job, "Complete") is not None
    if is_complete and given.now - ended_at < _RESULT_WAIT_S:
        return CachePlan(verdict=_progress_verdict(given), requeue_after_s=ended_at + _RESULT_WAIT_S - given.now)
    return _retry(given, job, ended_at)


def _watch_running(given: _Download, job: Manifest) -> CachePlan:
    """Leave a Job to its own retries, unless it is no longer the one that is wanted."""
    verdict = _progress_verdict(given)
    wanted = _render(given)
    if given.pods and given.failure is not None and is_over(given.pods[-1]) and _is_asked_again(given, given.failure):
        return CachePlan(verdict=verdict, actions=_delete_job(job, "Replaced: it is to be tried again now"))
    # Elsewhere it might find a node; placed as wanted, it waits for one.
    stuck_at = unschedulable_since(given.pods) if _differs(wanted, job, ANNOTATION_PLACEMENT) else None
    if stuck_at is None and not _differs(wanted, job, ANNOTATION_APPLIED_HASH):
        return CachePlan(verdict=verdict)
    actions = _delete_job(job, "Replaced: another download is wanted")
    if not given.observed.other_cache_users:
        return CachePlan(verdict=verdict, actions=actions)
    if stuck_at is None and given.failure is not None and not is_under_way(given.pods, given.observed):
        stuck_at = given.failure.time or given.now
    if stuck_at is None:
        return CachePlan(verdict=verdict)
    left_s = _left_s(given, job, stuck_at)
    if left_s > 0:
        return CachePlan(verdict=verdict, requeue_after_s=left_s)
    return CachePlan(verdict=verdict, actions=(*_record_attempt(given, job), *actions))


def _is_asked_again(given: _Download, failure: DownloadFailure) -> bool:
    """Whether a person wants another try now, and the Job itself waits."""
    asked_at = read_retry_at(given.observed.manifest)
    return asked_at is not None and (failure.time or 0.0) < asked_at <= given.now


def _retry(given: _Download, job: Manifest, ended_at: float) -> CachePlan:
    """Make an ended Job that left no model again: at once where a changed one may do better, else after a while."""
    is_different = _differs(_render(given), job, ANNOTATION_APPLIED_HASH)
    is_changed = is_different and not given.observed.other_cache_users
    left_s = _left_s(given, job, ended_at)
    verdict = _progress_verdict(given)
    if given.failure is None:
        message = "The download ended, and its result is not known; it is made again."
        verdict = given.volume.trouble or Verdict(holds=False, reason="DownloadFailed", message=message)
    actions = _delete_job(job, "Replaced: it has failed")
    if is_changed:
        return CachePlan(verdict=verdict, actions=actions)
    record = _record_attempt(given, job)
    if left_s > 0:
        return CachePlan(verdict=verdict, actions=record, requeue_after_s=left_s)
    return CachePlan(verdict=verdict, actions=(*record, *actions))


def _record_attempt(given: _Download, job: Manifest) -> tuple[Annotate, ...]:
    """Leave on the claim which try comes after a failed Job."""
    volume = given.observed.volume
    if volume is None:
        return ()
    attempt = min(_attempt_of(job) + 1, _MAX_ATTEMPT)
    name, text = _attempt_annotation(given.deployment), f"{attempt} {annotation_of(job, ANNOTATION_APPLIED_HASH)}"
    if annotation_of(volume, name) == text:
        return ()
    return (Annotate(ref=claim_ref(volume), annotations={name: text}, reason=f"Failed: attempt {attempt} is next"),)


def _next_attempt(given: _Download, wanted: Manifest) -> int:
    """Return which try a Job that is made now is: the first, if it does something else than its only user's last."""
    volume = given.observed.volume
    text = "" if volume is None else annotation_of(volume, _attempt_annotation(given.deployment)) or ""
    attempt, _, failed = text.partition(" ")
    is_same = failed == annotation_of(wanted, ANNOTATION_APPLIED_HASH)
    return _read_attempt(attempt) if is_same or given.observed.other_cache_users else 1


def _progress_verdict(given: _Download) -> Verdict:
    """Say how the download goes, in the order of what hinders it most."""
    failure, volume, observed = given.failure, given.volume, given.observed
    if volume.trouble is not None and volume.trouble.reason != "VolumePending":
        return volume.trouble
    if (obstacle := find_obstacle(given.pods, given.deployment, observed.at, observed.warnings)) is not None:
        return _prefer_volume(volume.trouble, obstacle)
    if failure is not None and not is_under_way(given.pods, observed):
        if failure.shortage is not None and volume.is_growing:
            message = f"PersistentVolumeClaim {given.claim} is being grown for the model."
            return Verdict(holds=False, reason="VolumeGrowing", message=message)
        return describe_failure(failure, given.deployment, volume.cure)
    if volume.trouble is not None:
        return volume.trouble
    if not given.pods and (refusal := _refusal(observed)):
        known = read_refusal(refusal, Subject.DOWNLOAD)
        message = f"The download's pod is refused: {known.detail if known else strip_object(refusal)}"
        return Verdict(holds=False, reason=known.reason if known else "DownloadForbidden", message=message)
    message = f"{_progress_message(given)}{_noted(volume)}"
    return Verdict(holds=False, reason="Downloading", message=message)


def _prefer_volume(trouble: Verdict | None, obstacle: Verdict) -> Verdict:
    """A pod that finds no node because its volume is not there has the volume's trouble."""
    return (
        trouble if trouble is not None and obstacle.reason in ("DownloadUnschedulable", "VolumePending") else obstacle
    )


def _progress_message(given: _Download) -> str:
    progress = given.observed.progress
    uri = parse_model_uri(given.deployment.spec.model.uri).shown
    if progress is None and ((given.observed.job or {}).get("spec") or {}).get("suspend"):
        return f"{uri} waits: its Job is suspended, as a queue (Kueue) does until it admits it."
    if progress is None:
        return f"{uri} is being downloaded."
    total = f" of {format_bytes(progress.total_bytes)}" if progress.total_bytes is not None else ""
    note = f"; {progress.message}" if progress.message else ""
    return f"{uri}: {format_bytes(progress.done_bytes)}{total}{note}"


def _refusal(observed: Observed) -> str | None:
    """Return why the Job may make no pod: a quota, or Pod Security."""
    if observed.job is None:
        return None
    found = find_warning(observed.warnings, JOB.kind, observed.job["metadata"]["name"], ("FailedCreate",))
    return None if found is None else found.message


def _create(given: _Download) -> Apply:
    attempt = _next_attempt(given, _render(given))
    return Apply(manifest=_render(given, attempt), reason="Created" if attempt == 1 else f"Created: attempt {attempt}")


def _render(given: _Download, attempt: int = 1) -> Manifest:
    return render_download_job(
        given.deployment,
        given.settings,
        given.hardware,
        given.claim,
        access_modes=access_modes_of(given.observed.volume),
        attempt=attempt,
    )


def _delete_job(job: Manifest | None, reason: str) -> tuple[Delete, ...]:
    if job is None or is_ending(job):
        return ()
    metadata = job["metadata"]
    ref = Ref(kind=JOB, namespace=metadata["namespace"], name=metadata["name"])
    return (Delete(ref=ref, uid=metadata["uid"], reason=reason),)


def _differs(wanted: Manifest, job: Manifest, annotation: str) -> bool:
    """Whether a Job has another digest than the wanted one: of what it does, or of where it runs."""
    return annotation_of(wanted, annotation) != annotation_of(job, annotation)


def _left_s(given: _Download, job: Manifest, failed_at: float) -> float:
    """Return how long a failed Job is left alone yet."""
    return due_at(failed_at, _attempt_of(job), read_retry_at(given.observed.manifest)) - given.now


def _attempt_of(job: Manifest) -> int:
    return _read_attempt(annotation_of(job, ANNOTATION_ATTEMPT) or "")


def _read_attempt(text: str) -> int:
    return min(max(int(text), 1), _MAX_ATTEMPT) if text.isdecimal() else 1


def _ended_at(job: Manifest) -> float | None:
    """Return when a Job ended; None while it runs."""
    for type_ in ("Complete", "Failed"):
        condition = condition_of(job, type_)
        if condition is not None and condition.get("status") == "True":
            return parse_time(condition.get("lastTransitionTime")) or 0.0
    return None


def _facts_annotation(deployment: LLMDeployment) -> str:
    model = deployment.spec.model
    return ANNOTATION_FACTS_PREFIX + model_digest(model.uri, model.revision)


def _attempt_annotation(deployment: LLMDeployment) -> str:
    model = deployment.spec.model
    return ANNOTATION_ATTEMPT_PREFIX + model_digest(model.uri, model.revision)
