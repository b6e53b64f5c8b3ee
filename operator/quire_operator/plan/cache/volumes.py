"""The claim that a model is kept in: whose it is, how large it should be, and what is wrong with it.

The cache volume is shared by every LLMDeployment of its model, which may want different things of it. So once it is
there it is only ever grown, with the class and access mode that it has, and never applied again for its own sake; what
two users would write in turns is not written. While it has no volume behind it, its only user may have another. A claim
that a user made is read, and changed by nobody here.
"""

import math
from dataclasses import dataclass
from typing import Final

from quire_contract.model_uri import Scheme, parse_model_uri
from quire_contract.names import ANNOTATION_GROWN_FOR, ANNOTATION_RETAIN, cache_pvc_name
from quire_contract.units import UnitError, format_bytes, parse_quantity
from quire_kube.objects import Manifest, Ref, annotation_of
from quire_operator.plan.actions import Action, Annotate, Apply, Delete, Verdict
from quire_operator.plan.resources.volume import render_volume
from quire_operator.spec.kinds import PERSISTENT_VOLUME_CLAIM
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import Settings
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed
from quire_operator.watch.pods import is_ending, is_over

GIB: Final = 1 << 30
AUTO_SIZE_BYTES: Final = 16 * GIB
"""Where the size is auto and the model's is not known yet."""
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
    """What is not as asked for, where that does no harm yet."""
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
    if change := _find_change(deployment, observed, volume):
        ref, uid = claim_ref(volume), volume["metadata"]["uid"]
        replaced = Delete(ref=ref, uid=uid, reason=f"Replaced before it was bound: {change} has changed")
        message = f"PersistentVolumeClaim {source.claim} is made anew: {change} has changed."
        return VolumePlan(actions=(replaced,), trouble=_pending(message), can_download=False)
    size = _plan_size(deployment, cluster, settings, volume, shortage)
    return VolumePlan(
        actions=(*size.actions, *_record_wish(deployment, observed, volume)),
        trouble=trouble,
        is_growing=size.is_growing,
        cure=size.cure,
        note=size.note,
        requeue_after_s=requeue_after_s,
    )


def requested_bytes(volume: Manifest) -> int:
    """Return how large a claim asks to be."""
    return _size(((volume["spec"].get("resources") or {}).get("requests") or {}).get("storage"))


def _capacity_bytes(volume: Manifest) -> int:
    return _size(((volume.get("status") or {}).get("capacity") or {}).get("storage"))


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
        return Verdict(holds=False, reason="VolumeLost", message=message)
    if phase == "Bound":
        return None
    if volume["spec"].get("storageClassName") is None and (missing := _no_default_class(deployment, cluster)):
        return missing
    warnings = [w for w in observed.warnings if w.kind == PERSISTENT_VOLUME_CLAIM.kind and w.name == name]
    newest = max(warnings, key=lambda warning: warning.time, default=None)
    if newest is None:
        return _pending(f"PersistentVolumeClaim {name} is not bound yet.")
    return _pending(f"PersistentVolumeClaim {name} is not bound: {newest.message}")


def _find_change(deployment: LLMDeployment, observed: Observed, volume: Manifest) -> str:
    """Return the field that asks for another claim than this one, if it can be had: nothing is behind it yet."""
    cache, spec = deployment.spec.cache, volume["spec"]
    is_bound = bool(spec.get("volumeName")) or (volume.get("status") or {}).get("phase", "Pending") != "Pending"
    if is_bound or observed.other_cache_users:
        return ""
    if cache.storage_class_name not in (None, spec.get("storageClassName")):
        return "spec.cache.storageClassName"
    if cache.access_mode is not None and [cache.access_mode] != spec.get("accessModes"):
        return "spec.cache.accessMode"
    return "spec.cache.size" if cache.size_bytes is not None and cache.size_bytes < requested_bytes(volume) else ""


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
    return Verdict(holds=False, reason="NoDefaultStorageClass", message=message)


def _pending(message: str) -> Verdict:
    return Verdict(holds=False, reason="VolumePending", message=message)


def _plan_size(
    deployment: LLMDeployment,
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
        note = f"{why}: {name} stays at {format_bytes(requested)}"
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


def _record_wish(deployment: LLMDeployment, observed: Observed, volume: Manifest) -> tuple[Annotate, ...]:
    """Leave on the volume whether it outlives its last user.

    Of several users, one that wants it kept prevails, and one that does not writes only when it is alone; otherwise
    they would overwrite each other for ever.
    """
    is_marked = annotation_of(volume, ANNOTATION_RETAIN) == "false"
    is_retained = deployment.spec.cache.retain
    if is_marked != is_retained or (not is_retained and observed.other_cache_users):
        return ()
    annotations = {ANNOTATION_RETAIN: "true" if is_retained else "false"}
    return (Annotate(ref=claim_ref(volume), annotations=annotations, reason="spec.cache.retain"),)


def _size(text: str | int | None) -> int:
    try:
        return 0 if text is None else int(parse_quantity(text))
    except UnitError:
        return 0
