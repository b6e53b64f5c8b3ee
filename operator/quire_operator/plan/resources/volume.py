"""The volume that holds a model: shared by every LLMDeployment of it in the namespace, and owned by none.

Knows not how large it should be, nor when it goes: the plan says so.
"""

from collections.abc import Sequence

from quire_contract import names
from quire_kube.objects import Manifest
from quire_operator.plan.resources.child import with_applied_hash
from quire_operator.spec.kinds import PERSISTENT_VOLUME_CLAIM
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import Settings

DEFAULT_ACCESS_MODE = "ReadWriteOnce"
"""What every StorageClass can do."""
HOSTNAME = "kubernetes.io/hostname"
_ONE_NODE_MODES = frozenset({"ReadWriteOnce", "ReadWriteOncePod"})
"""Access modes of a volume that is attached to one node at a time."""
_GIB = 1 << 30


def render_volume(deployment: LLMDeployment, settings: Settings, size_bytes: int) -> Manifest:
    """Build the claim. `settings` has no say yet; class and access mode are the spec's, or the cluster's default."""
    model, cache, inherited = deployment.spec.model, deployment.spec.cache, deployment.spec.children.inherited
    spec: Manifest = {
        "accessModes": [cache.access_mode or DEFAULT_ACCESS_MODE],
        "resources": {"requests": {"storage": _format_size(size_bytes)}},
    }
    if cache.storage_class_name is not None:
        spec["storageClassName"] = cache.storage_class_name
    return with_applied_hash(
        {
            "apiVersion": PERSISTENT_VOLUME_CLAIM.api_version,
            "kind": PERSISTENT_VOLUME_CLAIM.kind,
            "metadata": {
                "name": names.cache_pvc_name(model.uri, model.revision),
                "namespace": deployment.namespace,
                "labels": {**inherited.labels, **shared_labels(deployment, names.COMPONENT_CACHE)},
                "annotations": {**inherited.annotations, **model_annotations(deployment)},
            },
            "spec": spec,
        }
    )


def access_modes_of(volume: Manifest | None) -> tuple[str, ...]:
    """Return how a claim may be mounted; empty where there is none yet."""
    return () if volume is None else tuple(volume["spec"].get("accessModes") or ())


def claim_label(claim: str) -> dict[str, str]:
    """Return the label of all pods that mount a claim."""
    return {names.LABEL_CLAIM: names.claim_digest(claim)}


def affinity_to_volume(deployment: LLMDeployment, claim: str, access_modes: Sequence[str]) -> Manifest | None:
    """Keep all pods of a claim on one node, whosever they are, where it is attached to one; the first may go anywhere.

    Elsewhere a pod would wait for the volume for ever, and only its events would say so; one that finds no place here
    is unschedulable, which everybody sees.
    """
    modes = access_modes or (deployment.spec.cache.access_mode or DEFAULT_ACCESS_MODE,)
    if not _ONE_NODE_MODES.issuperset(modes):
        return None
    term = {"topologyKey": HOSTNAME, "labelSelector": {"matchLabels": claim_label(claim)}}
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def shared_labels(deployment: LLMDeployment, component: str) -> dict[str, str]:
    """Return the labels of what all LLMDeployments of a model share: none of them is named."""
    model = deployment.spec.model
    return {
        names.LABEL_NAME: names.APP_NAME,
        names.LABEL_COMPONENT: component,
        names.LABEL_PART_OF: names.APP_NAME,
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_CACHE: names.model_digest(model.uri, model.revision),
    }


def model_annotations(deployment: LLMDeployment) -> dict[str, str]:
    """Say in words which model a digest stands for."""
    model = deployment.spec.model
    revision = {names.ANNOTATION_MODEL_REVISION: model.revision} if model.revision is not None else {}
    return {names.ANNOTATION_MODEL_URI: model.uri, **revision}


def _format_size(size_bytes: int) -> str:
    return f"{size_bytes // _GIB}Gi" if size_bytes % _GIB == 0 else str(size_bytes)
