"""What a plan consists of: the writes to make, each with its reason.

Data only. `apply.py` carries them out; nothing else in the operator changes an object in the cluster.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quire_contract.memory.fit import FitReport
from quire_contract.model_facts import ModelFacts
from quire_kube.objects import Manifest, Ref


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Server-side apply of one document: created, or healed, or changed."""

    manifest: Manifest
    reason: str
    """Such as `Created`, `Changed: image`, `Healed: spec.replicas was edited`."""
    is_drift: bool = False
    """Somebody else changed what we own; said in an Event."""
    is_overruled: bool = False
    """It was sent, and what came back was changed all the same, by admission; said in an Event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Delete one object (in the background); gone already is as good."""

    ref: Ref
    uid: str
    """Only this incarnation."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReplicas:
    """Merge-patch `spec.replicas` of the LLMDeployment itself (seeding it once) or of a workload that must not change
    otherwise."""

    ref: Ref
    replicas: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotate:
    """Merge-patch annotations of an object that is not ours to apply whole: facts on a volume, costs on a pod."""

    ref: Ref
    annotations: Mapping[str, str]
    reason: str


Action = Apply | Delete | SetReplicas | Annotate


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer to one question about the spec: True, False, or None for not known yet."""

    holds: bool | None
    reason: str
    """One CamelCase word, fit for a condition."""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do about one LLMDeployment, and what was decided on the way."""

    actions: tuple[Action, ...] = ()
    accepted: Verdict
    model_cached: Verdict
    fits: Verdict
    autoscaling: Verdict
    replicas: int = 0
    """How many there should be now."""
    profile: str | None = None
    """The active one of `spec.profiles`."""
    facts: ModelFacts | None = None
    fit: FitReport | None = None
    revision: str | None = None
    """Digest of the pod template that all pods should have; None where none is wanted yet."""
    needs_loads: bool = False
    """The next decision needs the pods' loads (`Observed.loads`): fetch them and plan again."""
    requeue_after_s: float | None = None
    """Look again after so long, although nothing may have changed."""
    is_paused: bool = False
    """A person holds everything as it is."""
    num_withheld: int = 0
    """How many writes are left out for that."""
    rollout_waiting: bool = False
    """A changed template is held back until the pods that it replaces are idle."""
