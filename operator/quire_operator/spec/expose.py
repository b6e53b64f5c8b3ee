"""`spec.expose`: how a model is to be reached from outside the cluster. Read, and refused for now by acceptance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSpec:
    host: str
    class_name: str | None
    tls_secret_name: str | None
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentRef:
    name: str
    namespace: str | None
    section_name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRouteSpec:
    parent_refs: tuple[ParentRef, ...]
    hostnames: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExposeSpec:
    ingress: IngressSpec | None
    http_route: HttpRouteSpec | None
    inference_pool: bool


def read_expose(expose: Mapping[str, Any]) -> ExposeSpec:
    """Read the block as the API server stores it."""
    return ExposeSpec(
        ingress=_read_ingress(expose["ingress"]) if "ingress" in expose else None,
        http_route=_read_http_route(expose["httpRoute"]) if "httpRoute" in expose else None,
        inference_pool=expose["inferencePool"],
    )


def _read_ingress(ingress: Mapping[str, Any]) -> IngressSpec:
    return IngressSpec(
        host=ingress["host"],
        class_name=ingress.get("className"),
        tls_secret_name=ingress.get("tlsSecretName"),
        annotations=ingress.get("annotations", {}),
    )


def _read_http_route(route: Mapping[str, Any]) -> HttpRouteSpec:
    return HttpRouteSpec(
        parent_refs=tuple(
            ParentRef(name=p["name"], namespace=p.get("namespace"), section_name=p.get("sectionName"))
            for p in route["parentRefs"]
        ),
        hostnames=tuple(route.get("hostnames", ())),
    )
