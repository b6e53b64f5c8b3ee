"""Is a document applied? Whether the live object carries its digest, and still holds what it says.

What others have added (defaults, status, labels, sidecars, further ports) is none of our business; what we wrote and
somebody changed or removed is drift. The API server rewrites some values without changing their meaning: quantities,
fields left at zero, order within lists that have a key. None of that is drift, or else every look would find some.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

from quire_contract import names
from quire_contract.units import UnitError, parse_quantity
from quire_kube.objects import Manifest, annotation_of
from quire_operator.plan.resources.workload.merge import item_key
from quire_operator.spec.kinds import OPTIONAL_KINDS, SERVICE

_KEYS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("containers", "initContainers", "env", "volumes", "imagePullSecrets", "resourceClaims", "groups"), ("name",)
    ),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "ownerReferences": ("uid",),
}
"""Lists that several may write to, by field name: the API server merges their items by these fields."""
_SERVICE_PORT_KEY: Final = ("port", "protocol")
_CONTAINER_PORT_KEY: Final = ("containerPort", "protocol")
_QUANTITIES: Final = frozenset({"limits", "requests", "sizeLimit", "divisor"})
_ATOMIC_MAPS: Final = frozenset(
    {"selector", "matchLabels", "labelSelector", "podSelector", "namespaceSelector", "nodeSelector"}
)
"""Mappings that are one value: a label added to a selector selects other pods."""
_MAPS: Final = frozenset({"labels", "annotations", "matchLabels", "nodeSelector", "limits", "requests", "overhead"})
"""Mappings that are left out where they are empty; others say something by being there, such as `emptyDir`."""
_MEANINGFUL_ZEROS: Final = frozenset(
    {
        *("automountServiceAccountToken", "enableServiceLinks", "allowPrivilegeEscalation"),
        *("replicas", "maxSurge", "maxUnavailable", "backoffLimit", "terminationGracePeriodSeconds"),
        *("runAsUser", "runAsGroup", "fsGroup", "controller", "blockOwnerDeletion"),
    }
)
"""Fields whose absence means something else than false or 0, and which are therefore kept as they are sent."""

_UNSET_ZEROS: Final = frozenset({"timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"})
"""Fields in which 0 stands for the default, which the API server puts in its place."""


_OUR_MARKS: Final = f".{names.API_GROUP}/"
_POSITION: Final = re.compile(r"\[\d+\]")
"""Of an item in a list that is one value: where it stands tells a person nothing."""
_MAX_NAMED: Final = 3
_TAKEN_OUT: Final = "what is no longer asked for was taken out"


def is_applied(desired: Manifest, live: Manifest) -> bool:
    """Whether sending `desired` would change nothing."""
    name = names.ANNOTATION_APPLIED_HASH
    return annotation_of(desired, name) == annotation_of(live, name) and not describe_drift(desired, live)


def describe_drift(desired: Manifest, live: Manifest) -> str:
    """Return the path of the first field that is not as desired, such as `spec.replicas`; empty where all are."""
    return next(_Comparison(desired).find(desired, live, "", ""), "")


def describe_changes(desired: Manifest, live: Manifest) -> str:
    """Return the paths of the fields in which a document differs from the live object, in a person's terms.

    The operator's own marks, which follow from the rest, are left out; of many fields the first are named.
    """
    found = (_POSITION.sub("", path) for path in _Comparison(desired).find(desired, live, "", ""))
    paths = list(dict.fromkeys(path for path in found if _OUR_MARKS not in path))
    named, num_more = paths[:_MAX_NAMED], len(paths) - _MAX_NAMED
    return ", ".join(named) + (f" and {num_more} more" if num_more > 0 else "") or _TAKEN_OUT


class _Comparison:
    """Walks a desired document beside the live one. Knows the kind, on which some rules depend."""

    def __init__(self, desired: Manifest) -> None:
        kind = (desired["apiVersion"], desired["kind"])
        self._is_service = kind == (SERVICE.api_version, SERVICE.kind)
        # A custom resource is stored as it was sent.
        self._is_verbatim = kind in {(optional.api_version, optional.kind) for optional in OPTIONAL_KINDS}

    def find(self, desired: Any, live: Any, path: str, field: str) -> Iterator[str]:
        """Yield the paths of fields that differ, in the order of the desired document."""
        if isinstance(desired, dict) and isinstance(live, dict):
            yield from self._find_in_mapping(desired, live, path, field)
        elif isinstance(desired, list) and isinstance(live, list):
            yield from self._find_in_list(desired, live, path, field)
        elif not _is_equal(desired, live, field):
            yield path

    def _find_in_mapping(self, desired: Manifest, live: Manifest, path: str, field: str) -> Iterator[str]:
        if field in _ATOMIC_MAPS and desired.keys() != live.keys():
            yield path
            return
        for key, value in desired.items():
            here = f"{path}.{key}" if path else key
            # Below limits and requests, the keys are names of resources.
            inner = field if field in _QUANTITIES else key
            if live.get(key) is not None:
                yield from self.find(value, live[key], here, inner)
            elif value is not None and not self._is_droppable(key, value):
                yield here

    def _find_in_list(self, desired: list[Any], live: list[Any], path: str, field: str) -> Iterator[str]:
        keys = self._keys_of(field, desired)
        if keys is None:
            if len(desired) != len(live):
                yield path
                return
            for index, (wanted, there) in enumerate(zip(desired, live, strict=True)):
                yield from self.find(wanted, there, f"{path}[{index}]", field)
            return
        by_key = {item_key(item, keys): item for item in live if isinstance(item, dict)}
        for item in desired:
            key = item_key(item, keys)
            here = f"{path}[{key[0]}]"
            if key in by_key:
                yield from self.find(item, by_key[key], here, "")
            else:
                yield here

    def _keys_of(self, field: str, items: list[Any]) -> tuple[str, ...] | None:
        """Return what the items of a list are told apart by; None where the list is one value."""
        keys = _KEYS.get(field)
        if field == "ports":
            is_of_container = any(isinstance(item, dict) and "containerPort" in item for item in items)
            keys = _CONTAINER_PORT_KEY if is_of_container else _SERVICE_PORT_KEY if self._is_service else None
        if keys is None or not all(isinstance(item, dict) for item in items):
            return None
        return keys

    def _is_droppable(self, key: str, value: Any) -> bool:
        """Whether the API server leaves a field out that holds this value."""
        if value or self._is_verbatim or key in _MEANINGFUL_ZEROS:
            return False
        return not isinstance(value, dict) or key in _MAPS


def _is_equal(desired: Any, live: Any, field: str) -> bool:
    if isinstance(desired, bool) is not isinstance(live, bool):
        return False
    if desired == live or (desired == 0 and field in _UNSET_ZEROS):
        return True
    if field not in _QUANTITIES:
        return False
    try:
        return parse_quantity(desired) == parse_quantity(live)
    except UnitError:
        return False
