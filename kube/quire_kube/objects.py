"""Kinds of Kubernetes objects, references to objects, and where every object holds its labels and annotations.

Pure data. An object itself is a `Manifest`: plain JSON as the API server speaks it, never changed in place.
"""

from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Kind:
    """One kind, as discovery names it."""

    api_version: str
    kind: str
    plural: str
    is_namespaced: bool = True

    @property
    def group(self) -> str:
        """The API group; empty for the core API."""
        return self.api_version.rpartition("/")[0]

    def path(self, namespace: str = "") -> str:
        """Return where the API server has all objects of this kind, in one namespace or (empty) in all."""
        root = f"/apis/{self.api_version}" if self.group else f"/api/{self.api_version}"
        where = f"/namespaces/{namespace}" if namespace and self.is_namespaced else ""
        return f"{root}{where}/{self.plural}"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Key:
    """Namespace and name: one object, where its kind goes without saying."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Ref:
    """One object."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind.kind} {self.name}"


def annotation_of(manifest: Manifest, name: str) -> str | None:
    value: str | None = (manifest["metadata"].get("annotations") or {}).get(name)
    return value


def label_of(manifest: Manifest, name: str) -> str | None:
    value: str | None = (manifest["metadata"].get("labels") or {}).get(name)
    return value
