"""Strategic merge of `spec.podTemplate` into the pod template that the operator makes.

As `kubectl patch --type=strategic` does it: mappings merge, null removes, lists with a merge key merge by that key,
other lists are replaced, and `$patch: delete`, `$patch: replace` and `$deleteFromPrimitiveList/<field>` mean what they
mean there. It is kinder in three things: tolerations are added to those of the profile, required terms of affinity to
those without which a pod could not mount its model, and of fields that exclude one another (kinds of volume, handlers
of a probe, value and valueFrom) the user's replaces ours instead of joining it.
Knows nothing of what a pod is for. Never changes its arguments.
"""

from typing import Any, Final

from quire_kube.objects import Manifest
from quire_operator.spec.llm_deployment import SpecError

MERGE_KEYS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("containers", "initContainers", "ephemeralContainers", "env", "volumes", "imagePullSecrets"), ("name",)
    ),
    **dict.fromkeys(("resourceClaims", "schedulingGates", "claims"), ("name",)),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "protocol"),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey",),
    "tolerations": ("key", "operator", "value", "effect"),
}
"""Lists of a pod template whose items are told apart by these fields; all but tolerations must have the first."""

_ADDED: Final = frozenset({"requiredDuringSchedulingIgnoredDuringExecution"})
"""Lists of conditions that all must hold: the user's are further ones."""
_EXCLUSIVE: Final = (
    frozenset({"exec", "httpGet", "tcpSocket", "grpc", "sleep"}),
    frozenset({"value", "valueFrom"}),
)
_DIRECTIVE: Final = "$patch"
_REPLACE: Final = {_DIRECTIVE: "replace"}
"""As an item of a list: the whole list is replaced by the other items."""
_DELETE_FROM: Final = "$deleteFromPrimitiveList/"
_ORDER_ONLY: Final = ("$setElementOrder/", "$retainKeys")
"""Directives that `kubectl apply` writes for its own sake; a person means nothing by them."""


def merge_strategically(base: Manifest, patch: Any, path: str) -> Manifest:
    """Return `base` with `patch` merged in. `path` is the patch's, for errors.

    Raises:
        SpecError: the patch has another type than what it patches, an item has no merge key, or a directive is unknown.
    """
    merged = _merge_mapping(base, patch, path, "")
    return {} if merged is None else merged


def item_key(item: Manifest, keys: tuple[str, ...]) -> tuple[Any, ...]:
    """Return what tells an item of a list apart."""
    return tuple(item.get(key, "TCP" if key == "protocol" else None) for key in keys)


def _merge_mapping(base: Manifest, patch: Any, path: str, field: str) -> Manifest | None:
    """Merge one mapping; None where the patch deletes it. `field` is the list's name if the mapping is an item."""
    _require(isinstance(patch, dict), path, f"must be a mapping, not {_type_name(patch)}")
    directive = patch.get(_DIRECTIVE)
    _require(directive in (None, "merge", "replace", "delete"), f"{path}.{_DIRECTIVE}", "must be replace or delete")
    if directive == "delete":
        return None
    merged = {} if directive == "replace" else _without_excluded(base, patch, field)
    for key, value in patch.items():
        if key == _DIRECTIVE or key.startswith(_ORDER_ONLY):
            continue
        here = f"{path}.{key}"
        if key.startswith(_DELETE_FROM):
            _delete_from_list(merged, key.removeprefix(_DELETE_FROM), value, here)
            continue
        result = _merge_value(merged.get(key), value, here, key)
        if result is None:
            merged.pop(key, None)
        else:
            merged[key] = result
    return merged


def _merge_value(base: Any, value: Any, path: str, key: str) -> Any:
    """Merge one field; None where it is to be removed."""
    if value is None:
        return None
    if base is not None:
        is_alike = isinstance(base, dict) == isinstance(value, dict) and isinstance(base, list) == isinstance(
            value, list
        )
        _require(is_alike, path, f"must be {_type_name(base)}, not {_type_name(value)}")
    if isinstance(value, dict):
        return _merge_mapping(base or {}, value, path, "")
    if isinstance(value, list):
        if key in MERGE_KEYS:
            return _merge_list(base or [], value, path, key)
        kept = base or [] if key in _ADDED and _REPLACE not in value else []
        return [*kept, *(item for item in value if item != _REPLACE and item not in kept)]
    return value


def _merge_list(base: list[Any], patch: list[Any], path: str, field: str) -> list[Any]:
    """Merge a list by its merge key: known items in place, new ones at the end."""
    keys = MERGE_KEYS[field]
    merged = {} if _REPLACE in patch else {item_key(item, keys): item for item in base}
    for index, item in enumerate(patch):
        here = f"{path}[{index}]"
        _require(isinstance(item, dict), here, f"must be a mapping, not {_type_name(item)}")
        if item == _REPLACE:
            continue
        is_told_apart = field == "tolerations" or item.get(keys[0]) is not None
        _require(is_told_apart, f"{here}.{keys[0]}", "is required, because items are merged by it")
        key = item_key(item, keys)
        result = _merge_mapping(merged.get(key, {}), item, here, field)
        if result is None:
            merged.pop(key, None)
        else:
            merged[key] = result
    return list(merged.values())


def _without_excluded(base: Manifest, patch: Manifest, field: str) -> Manifest:
    """Return what stays of `base` beside the fields that `patch` sets."""
    given = {key for key, value in patch.items() if value is not None and not key.startswith("$")}
    if field == "volumes" and given - {"name"} - base.keys():
        return {}
    excluded: set[str] = set()
    for group in _EXCLUSIVE:
        if group & given:
            excluded |= group - given
    return {key: value for key, value in base.items() if key not in excluded}


def _delete_from_list(merged: Manifest, field: str, values: Any, path: str) -> None:
    _require(isinstance(values, list), path, f"must be a list, not {_type_name(values)}")
    if isinstance(merged.get(field), list):
        merged[field] = [item for item in merged[field] if item not in values]


def _require(is_met: bool, path: str, message: str) -> None:
    if not is_met:
        raise SpecError(path, message)


def _type_name(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else f"{value!r}"
