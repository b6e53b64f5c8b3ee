"""Objects as an API server returns them, for tests of the store and of what reads it."""

from collections.abc import Mapping
from typing import Any

from fake_kube import make_llm

from quire_contract import names
from quire_kube.objects import Key, Kind, Manifest

KEY = Key(namespace="default", name="smollm2")
URI = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
CLAIM = names.cache_pvc_name(URI)
JOB_NAME = names.download_job_name(URI, None, CLAIM)
SHARED_LABELS = {names.LABEL_CACHE: names.model_digest(URI), names.LABEL_MANAGED_BY: names.MANAGED_BY}


def make(
    kind: Kind,
    name: str,
    version: int = 1,
    uid: str = "u1",
    *,
    labels: Mapping[str, str] | None = None,
    owner_uid: str | None = None,
    **fields: Any,
) -> Manifest:
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": "default",
        "uid": uid,
        "resourceVersion": str(version),
        "labels": dict(labels or {}),
    }
    if owner_uid is not None:
        owner = {"apiVersion": names.GROUP_VERSION, "kind": names.KIND, "name": KEY.name, "uid": owner_uid}
        metadata["ownerReferences"] = [owner]
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, **fields}


def llm(name: str = "smollm2", version: int = 1, uid: str = "llm-1", **spec: Any) -> Manifest:
    manifest = make_llm(name, **spec)
    manifest["metadata"] |= {"uid": uid, "resourceVersion": str(version)}
    return manifest
