"""What a spec says of the objects that are made for a model: whose they are, what they carry, who may reach them.

Blocks are read as the API server stores them, so that nothing here can fail: the CRD's schema and rules have judged
them. Quantities stay as written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcesSpec:
    """Quantities as written; `parse_quantity` reads them."""

    limits: Mapping[str, str] = field(default_factory=dict)
    requests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataSpec:
    """What objects carry besides what the operator gives them."""

    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAccountSpec:
    name: str | None
    """None: the one that the operator makes."""
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    annotations: Mapping[str, str]

    @property
    def is_open_to_outside(self) -> bool:
        """Whether requests may come from no pod of the cluster."""
        return self.type != "ClusterIP"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildrenSpec:
    """What applies to all objects of a model, or to one of its own."""

    image: str | None
    """None: that of the hardware."""
    image_pull_secrets: tuple[str, ...]
    service_account: ServiceAccountSpec
    inherited: MetadataSpec
    service: ServiceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadSpec:
    """What a download's pods get, as a pod has it; of absent fields the administrator's defaults apply."""

    env: tuple[Mapping[str, Any], ...] = ()
    env_from: tuple[Mapping[str, Any], ...] = ()
    resources: ResourcesSpec | None = None
    ca_bundle: Mapping[str, Any] | None = None
    """`configMapKeyRef` or `secretKeyRef`."""
    service_account_name: str | None = None
    metadata: MetadataSpec = field(default_factory=MetadataSpec)
    image_pull_secrets: tuple[str, ...] = ()
    security_context: Mapping[str, Any] = field(default_factory=dict)


def read_children(spec: Mapping[str, Any]) -> ChildrenSpec:
    """Read the fields of `spec` that are about the model's objects."""
    account, service = spec["serviceAccount"], spec["service"]
    return ChildrenSpec(
        image=spec.get("image"),
        image_pull_secrets=_names(spec["imagePullSecrets"]),
        service_account=ServiceAccountSpec(name=account.get("name"), annotations=account.get("annotations", {})),
        inherited=_read_metadata(spec["inheritedMetadata"]),
        service=ServiceSpec(type=service["type"], annotations=service.get("annotations", {})),
    )


def read_download(download: Mapping[str, Any], resources: ResourcesSpec | None) -> DownloadSpec:
    """Read `spec.download`, whose resources are checked already."""
    return DownloadSpec(
        env=tuple(download.get("env", ())),
        env_from=tuple(download.get("envFrom", ())),
        resources=resources,
        ca_bundle=download.get("caBundle"),
        service_account_name=download.get("serviceAccountName"),
        metadata=_read_metadata(download),
        image_pull_secrets=_names(download.get("imagePullSecrets", ())),
        security_context=download.get("securityContext", {}),
    )


def _read_metadata(fields: Mapping[str, Any]) -> MetadataSpec:
    return MetadataSpec(labels=fields.get("labels", {}), annotations=fields.get("annotations", {}))


def _names(references: Any) -> tuple[str, ...]:
    return tuple(reference["name"] for reference in references)
