"""How an object is kept: without what nobody decides from, packed and compressed.

Of a thousand deployments the operator holds some ten thousand objects; as Python dictionaries they would take ten times
the memory. Owned objects keep every field, because what is applied is compared with them whole.
"""

import zlib
from typing import Any, Final

import msgspec

from quire_kube.objects import Manifest
from quire_operator.spec.kinds import POD
from quire_operator.watch.ownership import brief_managed_fields

_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_POD_SPEC_DROPPED: Final = frozenset(
    {"affinity", "imagePullSecrets", "securityContext", "tolerations", "topologySpreadConstraints", "volumes"}
)
_CONTAINER_DROPPED: Final = frozenset(
    {
        "args",
        "command",
        "env",
        "envFrom",
        "lifecycle",
        "readinessProbe",
        "securityContext",
        "volumeMounts",
    }
)
_LEVEL: Final = 1


def trim(manifest: Manifest) -> Manifest:
    """Return the object with its managed fields in brief, without kubectl's copy, and, of a pod, what it was to run."""
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "managedFields"}
    managed = brief_managed_fields(manifest["metadata"].get("managedFields") or ())
    if managed:
        metadata["managedFields"] = managed
    annotations = metadata.get("annotations")
    if annotations and _LAST_APPLIED in annotations:
        metadata["annotations"] = _without(annotations, {_LAST_APPLIED})
    trimmed = {**manifest, "metadata": metadata}
    if manifest["kind"] == POD.kind and "spec" in manifest:
        spec = _without(manifest["spec"], _POD_SPEC_DROPPED)
        for name in ("containers", "initContainers"):
            if name in spec:
                spec[name] = [_without(container, _CONTAINER_DROPPED) for container in spec[name]]
        trimmed["spec"] = spec
    return trimmed


def pack(manifest: Manifest) -> bytes:
    """Pack an object; `unpack` gives back what `trim` leaves of it."""
    return zlib.compress(msgspec.msgpack.encode(trim(manifest)), _LEVEL)


def unpack(packed: bytes) -> Manifest:
    manifest: Manifest = msgspec.msgpack.decode(zlib.decompress(packed))
    return manifest


def _without(fields: dict[str, Any], names: frozenset[str] | set[str]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}
