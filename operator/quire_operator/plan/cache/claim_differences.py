"""What a cache claim is that the spec no longer asks for, and the steps by which a person gets the wanted one.

Class and access mode of a claim never change, and its size never falls: while nothing is behind it, `volumes.py` has it
made anew, and afterwards only who deletes it can. Reads a spec and a claim; decides nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from quire_contract.units import UnitError, format_bytes, parse_quantity
from quire_kube.objects import Manifest
from quire_operator.spec.llm_deployment import CacheSpec

CLAIM_DIFFERS: Final = "ClaimDiffers"
"""Reason of the condition ModelCached where the model is there, in another claim than is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field of `spec.cache` that the claim does not have as it says."""

    field: str
    wanted: str
    present: str


def find_differences(cache: CacheSpec, volume: Manifest, *, is_shared: bool) -> tuple[Difference, ...]:
    """Return what no write could change of a claim that is bound; a larger size is not among it.

    Of a claim that is shared another user may want the size; that one is content with less is no difference.
    """
    spec = volume["spec"]
    modes, requested = spec.get("accessModes") or [], requested_bytes(volume)
    found = []
    if cache.storage_class_name not in (None, spec.get("storageClassName")):
        assert cache.storage_class_name is not None
        present = spec.get("storageClassName") or "no class"
        found.append(Difference(field="spec.cache.storageClassName", wanted=cache.storage_class_name, present=present))
    if cache.access_mode is not None and [cache.access_mode] != modes:
        found.append(Difference(field="spec.cache.accessMode", wanted=cache.access_mode, present=", ".join(modes)))
    if cache.size_bytes is not None and cache.size_bytes < requested and not is_shared:
        wanted, present = format_bytes(cache.size_bytes), format_bytes(requested)
        found.append(Difference(field="spec.cache.size", wanted=wanted, present=present))
    return tuple(found)


def describe_differences(differences: Sequence[Difference], volume: Manifest, other_users: Collection[str]) -> str:
    """Say them, and what to do; empty where there are none."""
    if not differences:
        return ""
    asked = " and ".join(
        f"{one.field} asks for {one.wanted}, PersistentVolumeClaim {volume['metadata']['name']} has {one.present}"
        for one in differences
    )
    return f"{asked}, which it keeps. {steps_to_another(volume, other_users)}"


def steps_to_another(volume: Manifest, other_users: Collection[str]) -> str:
    """Return how a claim is replaced by one that is as the spec says. Kubernetes lets none go that a pod mounts."""
    also = f" (and of {', '.join(sorted(other_users))}, which use it too)" if other_users else ""
    name = volume["metadata"]["name"]
    return (
        f"To have it as asked, set spec.suspend to true{also}, delete PersistentVolumeClaim {name}, and set"
        " spec.suspend to false: the model is downloaded anew"
    )


def requested_bytes(volume: Manifest) -> int:
    """Return how large a claim asks to be."""
    return quantity_bytes(((volume["spec"].get("resources") or {}).get("requests") or {}).get("storage"))


def quantity_bytes(text: str | int | None) -> int:
    """Read a size of a claim; 0 where there is none that can be read."""
    try:
        return 0 if text is None else int(parse_quantity(text))
    except UnitError:
        return 0
