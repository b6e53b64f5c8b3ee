"""What goes when the last LLMDeployment of a model is gone: its download, and its volume if that was asked for.

A volume that stays says since when nobody uses it, for whoever lists volumes and decides which to delete.

Volumes are owned by nobody, so the wish is read from the volume itself, where its users left it (`volumes.py`). A claim
that a person made is never touched: only what carries our labels and the name that we would give it is ours.
"""

from collections.abc import Iterable

from quire_contract.names import (
    ANNOTATION_MODEL_REVISION,
    ANNOTATION_MODEL_URI,
    ANNOTATION_RETAIN,
    ANNOTATION_UNUSED_SINCE,
    LABEL_CACHE,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    cache_pvc_name,
)
from quire_kube.objects import Kind, Manifest, Ref, annotation_of, label_of
from quire_kube.times import format_time
from quire_operator.plan.actions import Action, Annotate, Delete
from quire_operator.spec.kinds import JOB, PERSISTENT_VOLUME_CLAIM
from quire_operator.watch.pods import is_ending


def plan_orphans(claims: Iterable[Manifest], jobs: Iterable[Manifest], now: float) -> tuple[Action, ...]:
    """Return what to do with claims and Jobs that no LLMDeployment uses."""
    unused_jobs = [_delete(JOB, job, "Unused: no LLMDeployment wants this model") for job in jobs if _is_ours(job)]
    ours = [claim for claim in claims if is_our_volume(claim) and not is_ending(claim)]
    unused_claims = [action for claim in ours if (action := _plan_unused(claim, now)) is not None]
    return (*unused_jobs, *unused_claims)


def _plan_unused(claim: Manifest, now: float) -> Action | None:
    if annotation_of(claim, ANNOTATION_RETAIN) == "false":
        return _delete(PERSISTENT_VOLUME_CLAIM, claim, "Unused: the last user asked for cache.retain: false")
    if annotation_of(claim, ANNOTATION_UNUSED_SINCE):
        return None
    since = {ANNOTATION_UNUSED_SINCE: format_time(now)}
    return Annotate(ref=_ref(PERSISTENT_VOLUME_CLAIM, claim), annotations=since, reason="Unused, and retained")


def is_our_volume(claim: Manifest) -> bool:
    """Tell whether the operator made a claim; one that a person made may carry any label but not all of these."""
    uri = annotation_of(claim, ANNOTATION_MODEL_URI) or ""
    our_name = cache_pvc_name(uri, annotation_of(claim, ANNOTATION_MODEL_REVISION))
    return _has_labels(claim) and claim["metadata"]["name"] == our_name


def _is_ours(job: Manifest) -> bool:
    return _has_labels(job) and not is_ending(job)


def _has_labels(manifest: Manifest) -> bool:
    return label_of(manifest, LABEL_MANAGED_BY) == MANAGED_BY and label_of(manifest, LABEL_CACHE) is not None


def _delete(kind: Kind, manifest: Manifest, reason: str) -> Delete:
    return Delete(ref=_ref(kind, manifest), uid=manifest["metadata"]["uid"], reason=reason)


def _ref(kind: Kind, manifest: Manifest) -> Ref:
    return Ref(kind=kind, namespace=manifest["metadata"]["namespace"], name=manifest["metadata"]["name"])
