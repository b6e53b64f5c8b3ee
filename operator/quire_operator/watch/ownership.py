"""Who owns which fields of an object, by the API server's account of it (`metadata.managedFields`).

Server-side apply takes out what its manager applied before and does not name any more. Whoever creates or puts a whole
object, even under the same name, is another manager to it, whose fields stay. So that these go as well, what was
written whole has to be made over to the one who applies, before the next apply. Pure.
"""

import functools
from collections.abc import Sequence
from typing import Any, Final

from quire_contract import names
from quire_kube.objects import Manifest

WHOLE_MANAGER: Final = f"{names.FIELD_MANAGER}-whole"
"""Who creates or puts a whole object. A name of its own, so that what it then owns is told from what we patch."""
_APPLY: Final = "Apply"
_FIELDS: Final = "fieldsV1"
_ITSELF: Final = "."
"""A field that is owned beside some of the fields in it."""


def is_owned_whole(manifest: Manifest) -> bool:
    """Whether an object was created or put whole, and that has not been made over yet."""
    return any(entry.get("manager") == WHOLE_MANAGER for entry in manifest["metadata"].get("managedFields") or ())


def brief_managed_fields(managed: Sequence[Manifest]) -> list[Manifest]:
    """Return as much of an account as `is_owned_whole` needs; it is often half of an object."""
    return [{"manager": WHOLE_MANAGER} for entry in managed if entry.get("manager") == WHOLE_MANAGER]


def make_over(managed: Sequence[Manifest]) -> list[Manifest]:
    """Return an account in which what was written whole is what we applied, and what we applied still is."""
    whole = [entry for entry in managed if entry.get("manager") == WHOLE_MANAGER]
    if not whole:
        return list(managed)
    applied = [entry for entry in managed if _is_applied_by_us(entry)]
    others = [entry for entry in managed if entry not in applied and entry not in whole]
    fields = functools.reduce(_union, [entry.get(_FIELDS) or {} for entry in (*applied, *whole)])
    ours = {**whole[-1], "manager": names.FIELD_MANAGER, "operation": _APPLY, _FIELDS: fields}
    return [*others, ours]


def _is_applied_by_us(entry: Manifest) -> bool:
    is_ours = (entry.get("manager"), entry.get("operation")) == (names.FIELD_MANAGER, _APPLY)
    return is_ours and not entry.get("subresource")


def _union(one: Any, other: Any) -> Any:
    """Join two sets of fields: each is a tree of mappings, whose leaves are empty ones."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other
    both = {key: _union(one[key], other[key]) for key in one.keys() & other.keys()}
    itself: dict[str, Any] = {} if bool(one) is bool(other) else {_ITSELF: {}}
    return {**itself, **one, **other, **both}
