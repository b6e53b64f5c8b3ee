"""Finds out what the cluster around the operator is: its version, its optional APIs, its storage classes.

Pure functions read the answers; `discover` asks. Each optional API costs one small request that names only its group
and version, so that a broken aggregated API of somebody else is no matter here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quire_kube.api import ForbiddenError, Kube, NotFoundError
from quire_kube.objects import Kind, Manifest
from quire_operator.spec.kinds import LLM_DEPLOYMENT, OPTIONAL_KINDS, STORAGE_CLASS
from quire_operator.watch.cluster import ClusterFacts

_DEFAULT_CLASS_ANNOTATIONS: Final = (
    "storageclass.kubernetes.io/is-default-class",
    "storageclass.beta.kubernetes.io/is-default-class",
)
_OPENSHIFT_API: Final = "security.openshift.io/v1"
"""Of SecurityContextConstraints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What was found."""

    facts: ClusterFacts
    has_crd: bool
    """Whether the cluster has LLMDeployments at all."""


async def discover(kube: Kube, operator_namespace: str) -> Discovery:
    """Ask the cluster what it has.

    Raises:
        KubeError: the API server does not answer; what was known before is still the best that is known.
    """
    version = parse_version(await kube.raw_get("/version"))
    served: set[Kind] = set()
    wanted = (LLM_DEPLOYMENT, *OPTIONAL_KINDS)
    for api_version in sorted({kind.api_version for kind in wanted}):
        served |= served_kinds(await _get_or_none(kube, f"/apis/{api_version}"), wanted)
    is_openshift = await _get_or_none(kube, f"/apis/{_OPENSHIFT_API}") is not None
    try:
        classes: list[Manifest] | None = await kube.list(STORAGE_CLASS)
    except ForbiddenError:
        classes = None
    has_default, expandable = read_storage_classes(classes)
    known = sorted(item["metadata"]["name"] for item in classes or ())
    facts = ClusterFacts(
        kinds=frozenset(served) - {LLM_DEPLOYMENT},
        version=version,
        has_default_storage_class=has_default,
        storage_classes=tuple(known),
        expandable_storage_classes=expandable,
        is_openshift=is_openshift,
        operator_namespace=operator_namespace,
    )
    return Discovery(facts=facts, has_crd=LLM_DEPLOYMENT in served)


async def _get_or_none(kube: Kube, path: str) -> Mapping[str, Any] | None:
    try:
        found: Mapping[str, Any] = await kube.raw_get(path)
    except NotFoundError:
        return None
    return found


def parse_version(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Read `/version`. Vendors append to the minor version: 34+."""
    return _leading_number(answer.get("major")), _leading_number(answer.get("minor"))


def _leading_number(text: object) -> int:
    found = re.match(r"\d+", str(text or ""))
    return int(found.group()) if found else 0


def served_kinds(resource_list: Mapping[str, Any] | None, wanted: Iterable[Kind]) -> frozenset[Kind]:
    """Return which of the wanted kinds are in an APIResourceList and can be listed and watched; None has none."""
    if resource_list is None:
        return frozenset()
    api_version = resource_list.get("groupVersion")
    usable = {
        resource.get("name")
        for resource in resource_list.get("resources") or ()
        if {"list", "watch"} <= set(resource.get("verbs") or ())
    }
    return frozenset(kind for kind in wanted if kind.api_version == api_version and kind.plural in usable)


def read_storage_classes(classes: Iterable[Manifest] | None) -> tuple[bool | None, frozenset[str]]:
    """Return whether one of the classes is the default (None: not known), and which let a claim grow."""
    if classes is None:
        return None, frozenset()
    found = list(classes)
    expandable = frozenset(item["metadata"]["name"] for item in found if item.get("allowVolumeExpansion"))
    return any(_is_default(item) for item in found), expandable


def _is_default(storage_class: Manifest) -> bool:
    annotations = storage_class["metadata"].get("annotations") or {}
    return any(annotations.get(name) == "true" for name in _DEFAULT_CLASS_ANNOTATIONS)
