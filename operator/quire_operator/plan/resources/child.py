"""What all objects that the operator applies have in common: metadata, owner, and the digest of what was applied.

Knows nothing of what the objects are for. Invariant: equal input gives equal documents, and so equal digests.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from quire_contract import names
from quire_kube.objects import Kind, Manifest
from quire_operator.plan.resources.render_input import RenderInput


def build_child(
    given: RenderInput,
    kind: Kind,
    name: str,
    component: str = names.COMPONENT_SERVER,
    *,
    annotations: Mapping[str, str] | None = None,
    **body: Any,
) -> Manifest:
    """Return a document that the LLMDeployment owns. `with_applied_hash` comes last, when nothing changes any more."""
    owner, inherited = given.deployment, given.deployment.spec.children.inherited
    metadata: Manifest = {
        "name": name,
        "namespace": owner.namespace,
        "labels": {**inherited.labels, **names.common_labels(owner.name, component)},
        "ownerReferences": [
            {
                "apiVersion": names.GROUP_VERSION,
                "kind": names.KIND,
                "name": owner.name,
                "uid": owner.uid,
                "controller": True,
                # True would need a right on finalizers, and hold up a foreground deletion.
                "blockOwnerDeletion": False,
            }
        ],
    }
    if carried := {**inherited.annotations, **(annotations or {})}:
        metadata["annotations"] = carried
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, **body}


def with_applied_hash(manifest: Manifest) -> Manifest:
    """Return the document with the annotation that tells, on the live object, whether it has to be sent again."""
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), names.ANNOTATION_APPLIED_HASH: digest(manifest)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


def digest(value: Any) -> str:
    """Return sixteen hexadecimal digits that stand for a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def whole_seconds(seconds: float) -> int:
    """Round up: Kubernetes takes whole seconds only, and a shorter wait would break a promise."""
    return math.ceil(seconds)
