"""What the cluster is, read from answers such as API servers give."""

import asyncio
from typing import Any

import pytest

from quire_kube.api import ForbiddenError, NotFoundError, UnavailableError
from quire_kube.objects import Kind
from quire_operator.spec.kinds import (
    LEADER_WORKER_SET,
    LLM_DEPLOYMENT,
    OPTIONAL_KINDS,
    PROMETHEUS_RULE,
    SCALED_OBJECT,
    SERVICE_MONITOR,
)
from quire_operator.watch.discovery import discover, parse_version, read_storage_classes, served_kinds


def resource_list(*kinds: Kind, verbs: tuple[str, ...] = ("get", "list", "watch", "patch")) -> dict[str, Any]:
    resources = [{"name": kind.plural, "kind": kind.kind, "verbs": list(verbs)} for kind in kinds]
    resources += [{"name": f"{kind.plural}/status", "kind": kind.kind, "verbs": ["get", "patch"]} for kind in kinds]
    return {"kind": "APIResourceList", "groupVersion": kinds[0].api_version, "resources": resources}


def storage_class(name: str, *, expandable: bool = False, **annotations: str) -> dict[str, Any]:
    metadata = {"name": name, "annotations": {f"storageclass.kubernetes.io/{k}": v for k, v in annotations.items()}}
    return {"metadata": metadata, "allowVolumeExpansion": expandable}


class Cluster:
    """Answers discovery's questions."""

    def __init__(self, *kinds: Kind, classes: list[dict[str, Any]] | Exception) -> None:
        self._kinds = kinds
        self._classes = classes

    async def raw_get(self, path: str) -> Any:
        if path == "/version":
            return {"major": "1", "minor": "34+"}
        served = [kind for kind in self._kinds if path == f"/apis/{kind.api_version}"]
        if not served:
            raise NotFoundError(path)
        return resource_list(*served)

    async def list(self, kind: Kind) -> Any:
        if isinstance(self._classes, Exception):
            raise self._classes
        return self._classes


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        ({"major": "1", "minor": "34"}, (1, 34)),
        ({"major": "1", "minor": "33+"}, (1, 33)),
        ({"major": "1", "minor": "31-eks.4"}, (1, 31)),
        ({}, (0, 0)),
    ],
)
def test_version(answer: dict[str, Any], version: tuple[int, int]) -> None:
    assert parse_version(answer) == version


def test_kinds_are_served_only_if_they_can_be_watched() -> None:
    assert served_kinds(resource_list(SERVICE_MONITOR, PROMETHEUS_RULE), OPTIONAL_KINDS) == {
        SERVICE_MONITOR,
        PROMETHEUS_RULE,
    }
    assert served_kinds(resource_list(SERVICE_MONITOR, verbs=("get", "list")), OPTIONAL_KINDS) == set()
    assert served_kinds(None, OPTIONAL_KINDS) == set()


def test_same_plural_of_another_group_is_another_kind() -> None:
    answer = resource_list(SCALED_OBJECT) | {"groupVersion": "example.org/v1alpha1"}
    assert served_kinds(answer, OPTIONAL_KINDS) == set()


def test_storage_classes() -> None:
    assert read_storage_classes(None) == (None, frozenset())
    assert read_storage_classes([]) == (False, frozenset())
    classes = [storage_class("a", expandable=True), storage_class("b", **{"is-default-class": "true"})]
    assert read_storage_classes(classes) == (True, frozenset({"a"}))
    assert read_storage_classes([storage_class("b", **{"is-default-class": "false"})]) == (False, frozenset())


def test_discover() -> None:
    cluster = Cluster(LLM_DEPLOYMENT, LEADER_WORKER_SET, SERVICE_MONITOR, classes=[])
    found = asyncio.run(discover(cluster, "here"))  # type: ignore[arg-type]
    assert found.has_crd
    assert found.facts.kinds == {LEADER_WORKER_SET, SERVICE_MONITOR}
    assert found.facts.version == (1, 34)
    assert found.facts.has_default_storage_class is False
    assert found.facts.operator_namespace == "here"


def test_openshift_is_known_by_its_api() -> None:
    constraints = Kind(api_version="security.openshift.io/v1", kind="SecurityContextConstraints", plural="scc")
    for kinds, expected in (((LLM_DEPLOYMENT, constraints), True), ((LLM_DEPLOYMENT,), False)):
        found = asyncio.run(discover(Cluster(*kinds, classes=[]), "here"))  # type: ignore[arg-type]
        assert found.facts.is_openshift is expected


def test_discover_without_rights_and_without_the_crd() -> None:
    found = asyncio.run(discover(Cluster(classes=ForbiddenError("no")), "here"))  # type: ignore[arg-type]
    assert not found.has_crd
    assert found.facts.has_default_storage_class is None


def test_unreachable_cluster_is_an_error_and_no_finding() -> None:
    with pytest.raises(UnavailableError):
        asyncio.run(discover(Cluster(classes=UnavailableError("down")), "here"))  # type: ignore[arg-type]
