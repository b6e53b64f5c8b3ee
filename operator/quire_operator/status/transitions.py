"""Events on an LLMDeployment: one for each transition that somebody may ask about later, and none without one.

Pure: the old and the new status and the actions that were carried out decide. The same transition of the same object
has the same name, so an Event that is sent twice is there once; what is done again and again (somebody else keeps
editing a child) is said once a minute. At most `MAX_EVENTS` at a time, the most telling first.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quire_contract import names
from quire_kube.objects import Manifest
from quire_kube.times import format_time
from quire_operator.plan.actions import Action, Apply, Delete, Verdict
from quire_operator.plan.cache.claim_differences import CLAIM_DIFFERS
from quire_operator.spec.kinds import ref_of
from quire_operator.status.conditions import (
    ACCEPTED,
    FITS,
    LOADED,
    MODEL_CACHED,
    NOT_ACCEPTED,
    PAUSED,
    PENDING,
    PROGRESSING,
    READY,
    RESTARTED,
    ROLLOUT_COMPLETE,
    SCALED_TO_ZERO,
    SUSPENDED,
    find_condition,
)
from quire_operator.status.reasons import as_line
from quire_operator.status.situation import LOADING, PROGRESS_REASONS

MAX_EVENTS: Final = 6
MAX_MESSAGE_LENGTH: Final = 1024
"""What the API server allows."""

HEALED: Final = "Healed"
OVERRULED: Final = "Overruled"
RESUMED: Final = "Resumed"
CREATED: Final = "Created"
UPDATED: Final = "Updated"
DELETED: Final = "Deleted"

_UNREMARKABLE: Final = PROGRESS_REASONS | frozenset(
    {
        LOADING,
        PENDING,
        PROGRESSING,
        NOT_ACCEPTED,
        PAUSED,
        SUSPENDED,
        SCALED_TO_ZERO,
        "NoPods",
        "WaitingForIdle",
        "WaitingForModel",
        "ServiceMissing",
    }
)
"""Reasons of a condition that is False because things take their time, or as somebody asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    is_warning: bool = False
    reason: str
    message: str
    is_deed: bool = False
    """Something was done, which can be done again to the same object."""


def build_events(
    manifest: Manifest,
    old_status: Mapping[str, Any],
    new_status: Mapping[str, Any],
    applied: Sequence[Action],
    done_without: Sequence[Verdict],
    now: float,
) -> tuple[Manifest, ...]:
    """Return the Events to create. The order is: what is wrong, what was mended, what went well."""
    said = [
        *_from_conditions(old_status, new_status),
        *_from_pause(find_condition(old_status, ROLLOUT_COMPLETE), find_condition(new_status, ROLLOUT_COMPLETE)),
        *_from_refusals(done_without),
        *_from_actions(applied),
    ]
    said.sort(key=lambda one: (not one.is_warning, one.reason != HEALED))
    unique: dict[tuple[str, str], _Said] = {}
    for one in said:  # Ready repeats, in fewer words, what another condition says
        unique.setdefault((one.reason, one.message if one.is_deed else ""), one)
    return tuple(_build_event(manifest, one, now) for one in list(unique.values())[:MAX_EVENTS])


def _from_conditions(old_status: Mapping[str, Any], new_status: Mapping[str, Any]) -> Iterator[_Said]:
    for type_ in (ACCEPTED, MODEL_CACHED, FITS, LOADED, ROLLOUT_COMPLETE, READY):
        old, new = find_condition(old_status, type_), find_condition(new_status, type_)
        if not new or (old.get("status"), old.get("reason")) == (new["status"], new["reason"]):
            if type_ == LOADED and new.get("reason") == RESTARTED and old.get("message") != new["message"]:
                yield _Said(is_warning=True, reason=RESTARTED, message=new["message"])
            continue
        if new["status"] == "True":
            yield from _well(type_, old, new)
        elif new["status"] == "False" and new["reason"] not in _UNREMARKABLE:
            yield _Said(is_warning=True, reason=new["reason"], message=new["message"])
        elif type_ == READY and old.get("status") == "True":
            yield _Said(reason=new["reason"], message=new["message"])


def _from_pause(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[_Said]:
    was_paused, is_paused = old.get("reason") == PAUSED, new.get("reason") == PAUSED
    if is_paused and not was_paused:
        yield _Said(reason=PAUSED, message=new["message"])
    elif was_paused and not is_paused:
        yield _Said(reason=RESUMED, message="Changed and healed again, as the spec says")


def _well(type_: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[_Said]:
    was_true = old.get("status") == "True"
    if type_ == LOADED:
        was_told = old.get("status") == "False" and old.get("reason") not in _UNREMARKABLE
        if new["reason"] == RESTARTED and not was_told:
            yield _Said(is_warning=True, reason=RESTARTED, message=new["message"])
    elif type_ == READY and (not was_true or SCALED_TO_ZERO in (old.get("reason"), new["reason"])):
        reason = SCALED_TO_ZERO if new["reason"] == SCALED_TO_ZERO else READY
        yield _Said(reason=reason, message=new["message"])
    elif type_ == MODEL_CACHED and new["reason"] == CLAIM_DIFFERS:
        yield _Said(is_warning=True, reason=CLAIM_DIFFERS, message=new["message"])
    elif type_ in (MODEL_CACHED, ROLLOUT_COMPLETE) and not was_true and new["reason"] != PAUSED:
        yield _Said(reason=type_, message=new["message"])
    elif type_ in (ACCEPTED, FITS) and old.get("status") == "False":
        yield _Said(reason=type_, message=new["message"] or "As it should be again")


def _from_refusals(done_without: Sequence[Verdict]) -> Iterator[_Said]:
    """Say what the API server refuses and no condition tells of, because the model serves all the same."""
    for reason in dict.fromkeys(verdict.reason for verdict in done_without):
        messages = "; ".join(verdict.message for verdict in done_without if verdict.reason == reason)
        yield _Said(is_warning=True, reason=reason, message=f"Done without, and tried again: {messages}")


def _from_actions(applied: Iterable[Action]) -> Iterator[_Said]:
    """Say what was done to children: each healing by itself, the rest together."""
    done: dict[str, list[str]] = {CREATED: [], UPDATED: [], DELETED: []}
    for action in applied:
        if isinstance(action, Delete):
            done[DELETED].append(f"{action.ref.kind.kind} {action.ref.name} ({action.reason})")
        elif isinstance(action, Apply):
            ref = ref_of(action.manifest)
            child = f"{ref.kind.kind} {ref.name}"
            if action.is_overruled:
                yield _Said(is_warning=True, reason=OVERRULED, message=f"{child}: {_overruled(action)}")
            elif action.is_drift:
                what = action.reason.removeprefix(f"{HEALED}: ")
                yield _Said(reason=HEALED, message=f"{child}: {what}", is_deed=True)
            elif action.reason.startswith(CREATED):
                done[CREATED].append(child)
            else:
                done[UPDATED].append(f"{child} ({action.reason.removeprefix('Changed: ')})")
    for reason, children in done.items():
        if children:
            yield _Said(reason=reason, message=f"{reason} {', '.join(children)}", is_deed=True)


def _overruled(action: Apply) -> str:
    what = action.reason.removeprefix(f"{HEALED}: ").removesuffix(" was edited")
    return f"{what} is changed again whenever it is set, by an admission webhook or policy; it stays as that has it"


def _build_event(manifest: Manifest, said: _Said, now: float) -> Manifest:
    metadata = manifest["metadata"]
    name, namespace = metadata["name"], metadata.get("namespace", "default")
    message, time = as_line(said.message, MAX_MESSAGE_LENGTH), format_time(now)
    version = metadata.get("resourceVersion", "")
    minute = str(int(now) // 60) if said.is_deed else ""
    identity = "\0".join((metadata.get("uid", ""), version, said.reason, message, minute))
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{name}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
            "namespace": namespace,
        },
        "involvedObject": {
            "apiVersion": names.GROUP_VERSION,
            "kind": names.KIND,
            "name": name,
            "namespace": namespace,
            "uid": metadata.get("uid", ""),
            "resourceVersion": version,
        },
        "type": "Warning" if said.is_warning else "Normal",
        "reason": said.reason,
        "message": message,
        "source": {"component": names.FIELD_MANAGER},
        "reportingComponent": names.FIELD_MANAGER,
        "reportingInstance": "",
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
