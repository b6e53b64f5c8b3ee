"""Which of `spec.profiles` the pods get: the first, until its pods find no node for too long; then the next.

A profile is left only while no pod at all is placed: replicas that run are not moved to lesser hardware because one
more finds no node. Pods of older revisions count too, so the answer stays the same until the status has noted it. Where
there is no pod yet, the download's speaks for them, which runs where they will. After the last profile there is none to
try, so it stays. The first is tried again when nothing runs (no replicas), where trying costs nothing, and when the
active one leaves the list. Other changes of the spec do not lead back: an autoscaler changes it all the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quire_contract.units import UnitError, parse_duration
from quire_kube.objects import Manifest
from quire_kube.times import parse_time
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_operator.spec.settings import Settings
from quire_operator.watch.observed import Observed
from quire_operator.watch.pods import (
    VOLUME_NOT_BOUND,
    condition_of,
    is_ending,
    is_over,
    unschedulable_condition,
    why_unscheduled,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileChoice:
    """The profile to use now (None: resources are given instead), and when to look again."""

    name: str | None
    requeue_after_s: float | None = None


def check_profiles(deployment: LLMDeployment, settings: Settings) -> None:
    """Refuse a profile whose wait cannot be read. Whether it is known, `resolve_hardware` says.

    Raises:
        SpecError: as above.
    """
    for index, name in enumerate(deployment.spec.profiles):
        if name in settings.profiles:
            _fallback_after_s(settings, name, index)


def choose_profile(
    deployment: LLMDeployment, settings: Settings, observed: Observed, *, candidates: Sequence[str], now: float
) -> ProfileChoice:
    """Return the active profile. `candidates` are the profiles that the model fits, in the order of the spec."""
    if not deployment.spec.profiles:
        return ProfileChoice(name=None)
    if deployment.spec.suspend or deployment.spec.replicas == 0:
        return ProfileChoice(name=candidates[0])
    active = (observed.manifest.get("status") or {}).get("activeProfile") or {}
    name = str(active.get("name", ""))
    if name not in candidates:
        return ProfileChoice(name=candidates[0])
    following = candidates[candidates.index(name) + 1 :]
    unplaced_since = _unplaced_since(observed)
    if not following or unplaced_since is None:
        return ProfileChoice(name=name)
    began = max(unplaced_since, parse_time(active.get("since")) or 0.0)
    left_s = began + _fallback_after_s(settings, name, deployment.spec.profiles.index(name)) - now
    if left_s > 0:
        return ProfileChoice(name=name, requeue_after_s=left_s)
    return ProfileChoice(name=following[0])


def _unplaced_since(observed: Observed) -> float | None:
    """Return since when the pods wait for a node; None where none does, or one has been placed."""
    times = []
    for pod in [pod for pod in observed.pods if not is_ending(pod)] or _waiting_downloads(observed):
        condition = unschedulable_condition(pod)
        if condition is None and condition_of(pod, "PodScheduled") is not None:
            return None
        if condition is not None:
            times.append(parse_time(condition.get("lastTransitionTime")))
    return min((time for time in times if time is not None), default=None)


def _waiting_downloads(observed: Observed) -> list[Manifest]:
    """Return the download's pods that could run on another profile; for want of a volume none would run on any."""
    waiting = [pod for pod in observed.job_pods if not is_ending(pod) and not is_over(pod)]
    problems = [why_unscheduled(pod) for pod in waiting]
    return [] if any(found and found.reason == VOLUME_NOT_BOUND for found in problems) else waiting


def _fallback_after_s(settings: Settings, name: str, index: int) -> float:
    try:
        return parse_duration(settings.profiles[name].fallback_after)
    except UnitError as error:
        raise SpecError(f"spec.profiles[{index}]", f"profile {name!r} cannot be used: fallbackAfter: {error}") from None
