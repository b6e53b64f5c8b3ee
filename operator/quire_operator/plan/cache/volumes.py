"""The claim that a model is kept in: whose it is, how large it should be, and what is wrong with it.

The cache volume is shared by every LLMDeployment of its model, which may want different things of it. So once it is
there it is only ever grown, with the class and access mode that it has, and never applied again for its own sake; what
two users would write in turns is not written. While it has no volume behind it, its only user may have another; later
what differs is said (`claim_differences.py`). A claim that a user made is read, and changed by nobody here.
"""

import math
from dataclasses import dataclass, replace
from typing import Final

from quire_contract.model_uri import Scheme, parse_model_uri
from quire_contract.names import (
    ANNOTATION_GROWN_FOR,
    ANNOTATION_RETAIN,
    ANNOTATION_UNUSED_SINCE,
    cache_pvc_name,
)
from quire_contract.units import format_bytes
from quire_kube.objects import Manifest, Ref, annotation_of
from quire_operator.plan.actions import Action, Annotate, Apply, Delete, Verdict
from quire_operator.plan.cache.claim_differences import (
    Difference,
    describe_differences,
    find_differences,
    quantity_bytes,
    requested_bytes,
    steps_to_another,
)
from quire_operator.plan.cache.orphans import is_our_volume
from quire_operator.plan.resources.volume import render_volume
from quire_operator.spec.kinds import PERSISTENT_VOLUME_CLAIM
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import Settings
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed, find_warning
from quire_operator.watch.pods import is_ending, is_over

GIB: Final = 1 << 30
AUTO_SIZE_BYTES: Final = 16 * GIB
"""Where the size is auto and the model's is not known yet."""
NO_DEFAULT_STORAGE_CLASS: Final = "NoDefaultStorageClass"
VOLUME_LOST: Final = "VolumeLost"
STUCK_POLL_S: Final = 30.0
_GROWTH_MARGIN: Final = 1.1
_STILL: Final = "The volume is still being grown"
"""A pod that fails meanwhile is no reason to grow it further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a deployment's model is."""

    claim: str | None
    """None: an image, mounted as a volume."""
    is_users_claim: bool = False
    field: str = ""
    """Where the spec names the user's claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A pod of the download that had no space."""

    pod_uid: str
    need_bytes: int | None
    """Free space that it needed."""
    have_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumePlan:
    actions: tuple[Action, ...] = ()
    trouble: Verdict | None = None
    """Why nothing can be stored in it yet."""
    can_download: bool = True
    is_growing: bool = False
    cure: str = ""
    """For a shortage that cannot be ended from here: what a person would do."""
    note: str = ""
    """What is not as asked for, where that does no harm yet, and what to do about it."""
    requeue_after_s: float | None = None


def find_source(deployment: LLMDeployment) -> Source:
    """Return where the model's files are, or will be."""
    uri, cache = parse_model_uri(deployment.spec.model.uri), deployment.spec.cache
    if uri.scheme is Scheme.OCI:
        return Source(claim=None)
    if uri.scheme is Scheme.PVC:
        return Source(claim=uri.authority, is_users_claim=True, field="spec.model.uri")
    if cache.existing_claim is not None:
        return Source(claim=cache.existing_claim, is_users_claim=True, field="spec.cache.existingClaim")
    return Source(claim=cache_pvc_name(str(uri), deployment.spec.model.revision))


def plan_volume(
    deployment: LLMDeployment,
    observed: Observed,
    cluster: ClusterFacts,
    settings: Settings,
    *,
    source: Source,
    shortage: Shortage | None,
) -> VolumePlan:
    """Decide about the claim of a model that is kept in one."""
    planned = _plan_wanted(deployment, observed, cluster, settings, source=source, shortage=shortage)
    return replace(planned, actions=(*planned.actions, *_let_go(deployment, observed)))


def _plan_wanted(
    deployment: LLMDeployment,
    observed: Observed,
    cluster: ClusterFacts,
    settings: Settings,
    *,
    source: Source,
    shortage: Shortage | None,
) -> VolumePlan:
    volume = observed.volume
    if volume is None:
        size_bytes = deployment.spec.cache.size_bytes or AUTO_SIZE_BYTES
        created = Apply(manifest=render_volume(deployment, settings, size_bytes), reason="Created")
        message = f"PersistentVolumeClaim {source.claim} is being made."
        return VolumePlan(actions=(created,), trouble=_no_default_class(deployment, cluster) or _pending(message))
    if is_ending(volume):
        return VolumePlan(trouble=_ending(source, observed), can_download=False)
    trouble = _find_trouble(deployment, observed, cluster, volume)
    requeue_after_s = None if trouble is None else STUCK_POLL_S
    if source.is_users_claim:
        cure = _cure_for_users_claim(source, volume, shortage)
        return VolumePlan(trouble=trouble, cure=cure, requeue_after_s=requeue_after_s)
    is_shared = bool(observed.other_cache_users)
    differences = find_differences(deployment.spec.cache, volume, is_shared=is_shared)
    if differences and not _is_bound(volume) and not is_shared:
        return _replace(volume, differences[0])
    size = _plan_size(deployment, observed, cluster, settings, volume, shortage)
    return VolumePlan(
        actions=(*size.actions, *_record_use(deployment, observed, volume)),
        trouble=trouble,
        is_growing=size.is_growing,
        cure=size.cure,
        note=describe_differences(differences, volume, observed.other_cache_users) or size.note,
        requeue_after_s=requeue_after_s,
    )


def _capacity_bytes(volume: Manifest) -> int:
    return quantity_bytes(((volume.get("status") or {}).get("capacity") or {}).get("storage"))


def claim_ref(volume: Manifest) -> Ref:
    metadata = volume["metadata"]
    return Ref(kind=PERSISTENT_VOLUME_CLAIM, namespace=metadata["namespace"], name=metadata["name"])


def _find_trouble(
    deployment: LLMDeployment, observed: Observed, cluster: ClusterFacts, volume: Manifest
) -> Verdict | None:
    name, phase = volume["metadata"]["name"], (volume.get("status") or {}).get("phase")
    if phase == "Lost":
        message = (
            f"PersistentVolumeClaim {name} has lost its PersistentVolume; delete the claim, or bring the volume back."
        )
        return Verdict(holds=False, reason=VOLUME_LOST, message=message)
    if phase == "Bound":
        return None
    if volume["spec"].get("storageClassName") is None and (missing := _no_default_class(deployment, cluster)):
        return missing
    newest = find_warning(observed.warnings, PERSISTENT_VOLUME_CLAIM.kind, name)
    if newest is None:
        return _pending(f"PersistentVolumeClaim {name} is not bound yet.")
    return _pending(f"PersistentVolumeClaim {name} is not bound: {newest.message}")


def _is_bound(volume: Manifest) -> bool:
    is_waiting = (volume.get("status") or {}).get("phase", "Pending") == "Pending"
    return bool(volume["spec"].get("volumeName")) or not is_waiting


def _replace(volume: Manifest, difference: Difference) -> VolumePlan:
    """Let a claim go that nothing is behind yet, because the spec asks for another."""
    ref, uid = claim_ref(volume), volume["metadata"]["uid"]
    replaced = Delete(ref=ref, uid=uid, reason=f"Replaced before it was bound: {difference.field} has changed")
    message = f"PersistentVolumeClaim {ref.name} is made anew: {difference.field} has changed."
    return VolumePlan(actions=(replaced,), trouble=_pending(message), can_download=False)


def _ending(source: Source, observed: Observed) -> Verdict:
    """Say what a claim that is being deleted waits for: Kubernetes keeps it while pods mount it."""
    message = f"PersistentVolumeClaim {source.claim} is being deleted"
    cure = "create it again" if source.is_users_claim else "a new one is made when it is gone"
    if all(map(is_over, observed.pods)):
        return _pending(f"{message}; {cure}.")
    message = f"{message}, and goes when no pod uses it; set spec.suspend to true until it is gone: {cure}."
    return Verdict(holds=False, reason="VolumeDeleted", message=message)


def _no_default_class(deployment: LLMDeployment, cluster: ClusterFacts) -> Verdict | None:
    if deployment.spec.cache.storage_class_name is not None or cluster.has_default_storage_class is not False:
        return None
    message = (
        "The cluster has no default StorageClass; set spec.cache.storageClassName, or mark a class as the default."
    )
    return Verdict(holds=False, reason=NO_DEFAULT_STORAGE_CLASS, message=message)


def _pending(message: str) -> Verdict:
    return Verdict(holds=False, reason="VolumePending", message=message)


def _plan_size(
    deployment: LLMDeployment,
    observed: Observed,
    cluster: ClusterFacts,
    settings: Settings,
    volume: Manifest,
    shortage: Shortage | None,
) -> VolumePlan:
    """Grow a volume that is too small, where its class lets it; never shrink it."""
    requested, explicit = requested_bytes(volume), deployment.spec.cache.size_bytes
    wanted, reason, grown_for = explicit or 0, "spec.cache.size", annotation_of(volume, ANNOTATION_GROWN_FOR)
    is_new = shortage is not None and shortage.pod_uid != grown_for
    cure = ""
    if shortage is not None and is_new and 0 < _capacity_bytes(volume) < requested:
        marked = {ANNOTATION_GROWN_FOR: shortage.pod_uid}
        return VolumePlan(
            actions=(Annotate(ref=claim_ref(volume), annotations=marked, reason=_STILL),), is_growing=True
        )
    if shortage is not None and is_new:
        enough = _enough_bytes(volume, shortage)
        cure = f"set spec.cache.size to {enough // GIB}Gi"
        if explicit is None:
            wanted, reason, grown_for = enough, "the model needs more space", shortage.pod_uid
        elif wanted > requested:
            grown_for = shortage.pod_uid
    if wanted <= requested:
        return VolumePlan(cure=cure, is_growing=shortage is not None and not is_new)
    storage_class = volume["spec"].get("storageClassName") or ""
    if storage_class not in cluster.expandable_storage_classes:
        why = f"StorageClass {storage_class or 'of the claim'} does not expand volumes"
        name = volume["metadata"]["name"]
        steps = steps_to_another(volume, observed.other_cache_users)
        note = f"{why}: {name} stays at {format_bytes(requested)}. {steps}"
        return VolumePlan(cure=f"{cure}, and delete PersistentVolumeClaim {name} ({why})" if cure else "", note=note)
    grown = _grow(render_volume(deployment, settings, wanted), volume, grown_for)
    apply = Apply(manifest=grown, reason=f"Grown to {format_bytes(wanted)}: {reason}")
    return VolumePlan(actions=(apply,), is_growing=True)


def _grow(rendered: Manifest, volume: Manifest, grown_for: str | None) -> Manifest:
    """Return the document with all that cannot be changed as it is."""
    kept = {key: volume["spec"][key] for key in ("accessModes", "storageClassName") if key in volume["spec"]}
    annotations = dict(rendered["metadata"]["annotations"])
    if grown_for is not None:
        annotations[ANNOTATION_GROWN_FOR] = grown_for
    metadata = {**rendered["metadata"], "annotations": annotations}
    return {**rendered, "metadata": metadata, "spec": {**rendered["spec"], **kept}}


def _enough_bytes(volume: Manifest, shortage: Shortage) -> int:
    """Return a size, in whole GiB, that would have been enough."""
    size = max(_capacity_bytes(volume), requested_bytes(volume))
    missing = size // 2  # the filesystem was full before anything was known
    if shortage.need_bytes is not None:
        missing = max(shortage.need_bytes - (shortage.have_bytes or 0), 0)
    return math.ceil((size + missing) * _GROWTH_MARGIN / GIB) * GIB


def _cure_for_users_claim(source: Source, volume: Manifest, shortage: Shortage | None) -> str:
    if shortage is None:
        return ""
    return f"grow PersistentVolumeClaim {source.claim} to {_enough_bytes(volume, shortage) // GIB}Gi"


def _record_use(deployment: LLMDeployment, observed: Observed, volume: Manifest) -> tuple[Annotate, ...]:
    """Leave on the volume that it is used, and whether it outlives its last user.

    Of several users, one that wants it kept prevails, and one that does not writes only when it is alone; otherwise
    they would overwrite each other for ever.
    """
    annotations = {ANNOTATION_UNUSED_SINCE: ""} if annotation_of(volume, ANNOTATION_UNUSED_SINCE) else {}
    is_retained = deployment.spec.cache.retain
    if _is_marked(volume) == is_retained and (is_retained or not observed.other_cache_users):
        annotations[ANNOTATION_RETAIN] = "true" if is_retained else "false"
    if not annotations:
        return ()
    return (Annotate(ref=claim_ref(volume), annotations=annotations, reason="Used: spec.cache.retain"),)


def _let_go(deployment: LLMDeployment, observed: Observed) -> tuple[Annotate, ...]:
    """Leave the wish on the volume that the deployment had until its model changed, where both changed at once."""
    left = observed.left_volume
    if left is None or deployment.spec.cache.retain or _is_marked(left) or not is_our_volume(left):
        return ()
    return (Annotate(ref=claim_ref(left), annotations={ANNOTATION_RETAIN: "false"}, reason="Left: spec.cache.retain"),)


def _is_marked(volume: Manifest) -> bool:
    """Whether it goes with its last user."""
    return annotation_of(volume, ANNOTATION_RETAIN) == "false"
