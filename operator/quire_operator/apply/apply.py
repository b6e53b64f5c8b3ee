"""Carries out what a plan says, in its order: the only place from which objects in the cluster are changed.

One action's failure does not keep the others from being tried, unless nobody answers at all. What the API server
returns goes into the store, so that the next plan sees it before the watch does. Takes over no object that somebody
else has made under a wanted name. Decides nothing else.

Objects are kept by server-side apply, which alone tells our fields from those of others. What users merge nothing into
is created by a plain create, though: that is one call instead of two (a look whether the name is free, and the apply)
and no other object can slip in between. Before the first apply over it, `ownership.py` puts its owners right.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from quire_contract import names
from quire_kube.api import (
    AlreadyExistsError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    Kube,
    KubeError,
    MistypedError,
    NamespaceTerminatingError,
    NameTakenError,
    NotFoundError,
    UnreachableError,
)
from quire_kube.objects import Manifest, Ref, annotation_of, label_of
from quire_kube.times import format_time
from quire_operator.plan.actions import Action, Annotate, Apply, Delete, Plan, SetReplicas, Verdict
from quire_operator.plan.admission import Subject, read_refusal
from quire_operator.plan.drift import describe_drift
from quire_operator.spec.kinds import (
    JOB,
    LEADER_WORKER_SET,
    OPTIONAL_KINDS,
    OWNED_KINDS,
    PERSISTENT_VOLUME_CLAIM,
    WORKLOAD_KINDS,
    ref_of,
)
from quire_operator.watch.ownership import WHOLE_MANAGER, is_owned_whole, make_over
from quire_operator.watch.store import Store, owner_uids

logger = logging.getLogger(__name__)

_POD_TEMPLATE: Final = re.compile(r"spec\.(template|leaderWorkerTemplate\.(leader|worker)Template)\b")
_SUBJECTS: Final = {
    PERSISTENT_VOLUME_CLAIM: Subject.CLAIM,
    JOB: Subject.DOWNLOAD,
    **dict.fromkeys(WORKLOAD_KINDS, Subject.SERVER),
}
_CREATED_WHOLE: Final = frozenset(OWNED_KINDS).difference(WORKLOAD_KINDS)
"""Kinds into which users merge nothing: of a field that a kind lacks, only apply says that it does."""
_SERVES_WITHOUT: Final = frozenset(OPTIONAL_KINDS) - {LEADER_WORKER_SET}
"""Kinds without which a model serves all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The API server will not have an object as it is wanted; trying the same again helps only after a change."""

    ref: Ref
    error: KubeError
    is_minor: bool = False
    """The deployment can do without: it is tried again, and says nothing against the spec."""

    def as_verdict(self) -> Verdict:
        """Say it as the answer to whether the spec is accepted."""
        error, reason, message = self.error, "RefusedByServer", f"{self.ref}: {self.error}"
        if isinstance(error, ForbiddenError):
            known = read_refusal(str(error), _SUBJECTS.get(self.ref.kind, Subject.OTHER))
            reason = known.reason if known else "Forbidden"
            message = f"{self.ref}: {known.detail}" if known else message
        elif isinstance(error, NameTakenError):
            reason = "NameTaken"
        elif isinstance(error, InvalidError) and error.fields:
            message = f"{self.ref}: " + "; ".join(f"{path}: {text}" for path, text in error.fields)
            if isinstance(error, MistypedError) and any(_POD_TEMPLATE.match(path) for path, _ in error.fields):
                # What is rendered is well-typed, so it is what the user has merged into it.
                reason = "InvalidPodTemplate"
                message = f"spec.podTemplate: {message}; correct it in spec.podTemplate"
        return Verdict(holds=False, reason=reason, message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What became of a plan's actions."""

    done: tuple[Action, ...] = ()
    """Those that changed something."""
    refusals: tuple[Refusal, ...] = ()
    failure: KubeError | None = None
    """The first error that goes away by trying again."""
    is_namespace_ending: bool = False
    has_learned: bool = False
    """The store has changed: the same plan made now could be another."""

    @property
    def is_complete(self) -> bool:
        is_refused = any(not refusal.is_minor for refusal in self.refusals)
        return not is_refused and self.failure is None and not self.is_namespace_ending


async def apply_actions(kube: Kube, store: Store, actions: Sequence[Action], *, now: float) -> Applied:
    """Carry out actions; never raises a KubeError, tells what failed instead."""
    done: list[Action] = []
    refusals: list[Refusal] = []
    failure: KubeError | None = None
    is_namespace_ending = has_learned = False
    for action in actions:
        try:
            outcome = await _carry_out(kube, store, action, now)
            overruled = _overruled(store, action) if outcome is _Outcome.DONE else None
            has_learned |= outcome is not _Outcome.NOTHING and overruled is None
            if outcome is _Outcome.DONE:
                done.append(overruled or action)
        except (InvalidError, ForbiddenError, NameTakenError) as error:
            refusals.append(_refusal(action, error))
        except NamespaceTerminatingError:
            is_namespace_ending = True
        except KubeError as error:
            failure = failure or error
            if isinstance(error, UnreachableError):
                break
    return Applied(
        done=tuple(done),
        refusals=tuple(refusals),
        failure=failure,
        is_namespace_ending=is_namespace_ending,
        has_learned=has_learned,
    )


def _overruled(store: Store, action: Action) -> Apply | None:
    """Return what was healed in vain, and is marked so: admission has changed it again on its way in."""
    if not isinstance(action, Apply) or not action.is_drift:
        return None
    live = store.get(ref_of(action.manifest))
    is_as_sent = live is None or not describe_drift(action.manifest, live)
    return None if is_as_sent else dataclasses.replace(action, is_overruled=True)


def with_refusals(plan: Plan, applied: Applied) -> Plan:
    """Return the plan with what the API server refused, and what matters, as its verdict on the spec."""
    refusal = next((refusal for refusal in applied.refusals if not refusal.is_minor), None)
    if refusal is None or plan.accepted.holds is False:
        return plan
    return dataclasses.replace(plan, accepted=refusal.as_verdict())


def _refusal(action: Action, error: KubeError) -> Refusal:
    ref = _ref_of(action)
    is_minor = isinstance(action, Annotate) or ref.kind in _SERVES_WITHOUT
    if is_minor:
        logger.warning("Refused, and done without until it is taken object=%s error=%s", ref, error)
    return Refusal(ref=ref, error=error, is_minor=is_minor)


class _Outcome(Enum):
    DONE = auto()
    NOTHING = auto()
    """There was nothing left to do."""
    LEARNED = auto()
    """The object is there, and the store did not know it: plan again."""


async def _carry_out(kube: Kube, store: Store, action: Action, now: float) -> _Outcome:
    match action:
        case Apply():
            return await _apply(kube, store, action.manifest)
        case Delete():
            if store.is_ending(action.ref):
                return _Outcome.NOTHING
            await kube.delete(action.ref, action.uid)
            store.mark_ending(action.ref, action.uid, format_time(now))
            return _Outcome.DONE
        case SetReplicas():
            return await _patch(kube, store, action.ref, {"spec": {"replicas": action.replicas}})
        case Annotate():
            return await _patch(kube, store, action.ref, {"metadata": {"annotations": dict(action.annotations)}})


async def _apply(kube: Kube, store: Store, manifest: Manifest) -> _Outcome:
    ref = ref_of(manifest)
    if store.is_ending(ref):
        return _Outcome.NOTHING  # the event that it is gone brings the key back
    before = store.get(ref)
    if before is None:
        after = await _create(kube, manifest) if ref.kind in _CREATED_WHOLE else None
        if after is not None:
            store.put(after)
            return _Outcome.DONE
        live = await kube.get(ref)
        if live is not None:
            _check_is_free(live, manifest)
            if store.put(live):
                return _Outcome.LEARNED
        before = store.get(ref)  # the watch may have told of it meanwhile
    else:
        _check_is_free(before, manifest)
    after = await (_apply_as_owner(kube, manifest) if before is None else _apply_over(kube, before, manifest))
    store.put(after)
    # An API server without a feature drops its fields without a word: sending them again changes nothing.
    return _Outcome.NOTHING if before is not None and _version(after) == _version(before) else _Outcome.DONE


async def _create(kube: Kube, manifest: Manifest) -> Manifest | None:
    """Create an object; None where there is one of its name."""
    try:
        return await kube.create(manifest, manager=WHOLE_MANAGER)
    except AlreadyExistsError:
        return None
    except ForbiddenError:  # a quota that is used up is said before that the name is taken
        if await kube.get(ref_of(manifest)) is None:
            raise
        return None


async def _apply_over(kube: Kube, before: Manifest, manifest: Manifest) -> Manifest:
    """Apply to an object that is there; where that cannot work, put the whole object first.

    Server-side apply tells the items of a list by their keys. If somebody edits a key, say the number of a Service's
    port, the item that we send stands beside the edited one, and together they are invalid for ever.
    """
    ref = ref_of(manifest)
    if is_owned_whole(before):
        live = await kube.get(ref)  # the store keeps no account of the fields
        if live is not None and is_owned_whole(live):
            await _make_over(kube, live)
    try:
        return await _apply_as_owner(kube, manifest)
    except MistypedError:
        raise  # putting it would drop the field without a word, and change the rest
    except InvalidError as error:
        live = await kube.get(ref)
        if live is None:
            raise
        try:
            await kube.replace(_whole(manifest, live), manager=WHOLE_MANAGER)
        except (InvalidError, ForbiddenError):
            raise error from None  # the document itself is at fault, and this says so in its own terms
    return await _apply_as_owner(kube, manifest)


async def _apply_as_owner(kube: Kube, manifest: Manifest) -> Manifest:
    """Apply; once more, where the answer says that the object was written whole and the store did not know."""
    after = await kube.apply(manifest)
    if not is_owned_whole(after):
        return after
    await _make_over(kube, after)
    return await kube.apply(manifest)


async def _make_over(kube: Kube, live: Manifest) -> None:
    """Put the ownership of an object right that was written whole."""
    metadata = {"resourceVersion": _version(live), "managedFields": make_over(live["metadata"]["managedFields"])}
    await kube.merge_patch(ref_of(live), {"metadata": metadata})


def _whole(manifest: Manifest, live: Manifest) -> Manifest:
    """Return the document as one that replaces the live object: without what others have added, save the scale."""
    metadata = {**manifest["metadata"], **{key: live["metadata"][key] for key in ("uid", "resourceVersion")}}
    whole = {**manifest, "metadata": metadata}
    replicas = (live.get("spec") or {}).get("replicas")
    if replicas is not None and "spec" in manifest:
        whole["spec"] = {"replicas": replicas, **manifest["spec"]}
    return whole


async def _patch(kube: Kube, store: Store, ref: Ref, patch: Manifest) -> _Outcome:
    try:
        store.put(await kube.merge_patch(ref, patch))
    except NotFoundError:
        return _Outcome.NOTHING  # gone meanwhile, which the watch will tell
    return _Outcome.DONE


def _check_is_free(live: Manifest, wanted: Manifest) -> None:
    """Raise unless an object may be taken for the wanted one. Others' may have our label, and so be in the store."""
    if not _is_ours(live, wanted):
        message = f"an object of this name exists and is not Quire's; delete it or rename the {names.KIND}"
        raise NameTakenError(message)
    _check_owner(live, wanted)


def _check_owner(live: Manifest, wanted: Manifest) -> None:
    """Raise where an object of ours is another LLMDeployment's: a former one of this name, or another name's."""
    if not owner_uids(live) or not owner_uids(wanted) or not owner_uids(live).isdisjoint(owner_uids(wanted)):
        return
    if _owner_names(live).isdisjoint(_owner_names(wanted)):
        owner = ", ".join(sorted(_owner_names(live)))
        raise NameTakenError(f"it belongs to {names.KIND} {owner}; rename one of the two")
    raise ConflictError(f"{ref_of(live)} belongs to a deleted {names.KIND} of this name; waiting until it is gone")


def _owner_names(manifest: Manifest) -> set[str]:
    return {owner["name"] for owner in manifest["metadata"]["ownerReferences"] if owner["kind"] == names.KIND}


def _is_ours(live: Manifest, wanted: Manifest) -> bool:
    """Whether an object is one that we made: labels may have been edited away."""
    return (
        label_of(live, names.LABEL_MANAGED_BY) == names.MANAGED_BY
        or annotation_of(live, names.ANNOTATION_APPLIED_HASH) is not None
        or not owner_uids(wanted).isdisjoint(owner_uids(live))
    )


def _version(manifest: Manifest) -> str:
    return str(manifest["metadata"]["resourceVersion"])


def _ref_of(action: Action) -> Ref:
    return ref_of(action.manifest) if isinstance(action, Apply) else action.ref
