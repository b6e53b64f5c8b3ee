"""How many replicas a model should have: one pure function, used by `quire up` and by the operator's own scaler.

Knows no cluster and no clock. The caller keeps `ScalingMemory` between decisions and passes it back in.

Invariants of `decide`:
* the answer is within [min, max];
* more demand never gives fewer replicas, all else equal;
* from zero, demand gives max(min, 1) replicas at once; zero is given only where min is 0 and nothing was asked for
  `idle_to_zero_after_s`;
* replicas that are not ready yet freeze scaling up, because what waits for them is not new demand;
* scaling down goes to the most that was wanted in a window of at least `scale_down_delay_s`, so a load that comes and
  goes within the window changes nothing.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingMemory:
    """Fewer replicas have been wanted than there are since `below_since`; `most_wanted` is the most wanted since."""

    below_since: float
    most_wanted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingInput:
    """What is known at one moment. Times are seconds on one clock."""

    demand: float
    """Requests waiting, plus requests in flight, plus the activation lease (1 while a wake-up is owed)."""
    target_per_replica: float
    min_replicas: int
    max_replicas: int
    current_replicas: int
    """What was last decided, ready or not."""
    pending_replicas: int
    """How many of those do not serve yet."""
    last_demand_time: float
    """When demand was last above zero; before any, when the model was created or the caller started."""
    scale_down_delay_s: float
    idle_to_zero_after_s: float | None
    """None: never to zero, as with a minimum above zero."""
    now: float
    memory: ScalingMemory | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(f"replicas between {self.min_replicas} and {self.max_replicas} cannot be kept")
        if self.target_per_replica <= 0:
            raise ValueError(f"target_per_replica must be above 0, not {self.target_per_replica}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingDecision:
    """The number of replicas, why, and what to pass to the next decision."""

    replicas: int
    reason: str
    memory: ScalingMemory | None = None


def decide(given: ScalingInput) -> ScalingDecision:
    """Return how many replicas there should be now."""
    current = min(max(given.current_replicas, given.min_replicas), given.max_replicas)
    if current != given.current_replicas:
        return ScalingDecision(replicas=current, reason=f"min {given.min_replicas}, max {given.max_replicas}")
    if given.demand <= 0:
        return _without_demand(given)
    if current == 0:
        return ScalingDecision(replicas=1, reason=f"woken by {_requests(given.demand)}")
    # The tolerance keeps 3 × 0.1 ÷ 0.1 from being four replicas.
    wanted = math.ceil(given.demand / given.target_per_replica - 1e-9)
    why = f"{_requests(given.demand)} at {given.target_per_replica:g} per replica"
    return _towards(given, wanted, why)


def _without_demand(given: ScalingInput) -> ScalingDecision:
    """Stay at zero, go to zero, or keep one replica warm."""
    current = given.current_replicas
    if current == 0:
        return ScalingDecision(replicas=0, reason="no demand")
    idle_s = given.now - given.last_demand_time
    may_sleep = given.min_replicas == 0 and given.idle_to_zero_after_s is not None
    if may_sleep and given.idle_to_zero_after_s is not None and idle_s >= given.idle_to_zero_after_s:
        return ScalingDecision(replicas=0, reason=f"idle for {idle_s:.0f} s")
    return _towards(given, 0, "no demand")


def _towards(given: ScalingInput, wanted: int, why: str) -> ScalingDecision:
    """Go from `current` (at least 1) towards `wanted`: up at once unless replicas are pending, down after the delay."""
    current = given.current_replicas
    bounded = min(max(wanted, given.min_replicas, 1), given.max_replicas)
    if bounded == current:
        limit = f", max {given.max_replicas}" if wanted > bounded else ""
        return ScalingDecision(replicas=current, reason=why + limit)
    if bounded > current:
        if given.pending_replicas > 0:
            return ScalingDecision(replicas=current, reason=f"{why}, {given.pending_replicas} still starting")
        return ScalingDecision(replicas=bounded, reason=why)
    memory = _remember(given, bounded)
    lasted_s = given.now - memory.below_since
    if lasted_s < given.scale_down_delay_s:
        left_s = given.scale_down_delay_s - lasted_s
        return ScalingDecision(replicas=current, reason=f"{why}, fewer in {math.ceil(left_s)} s", memory=memory)
    # What was wanted at the end of this window opens the next one.
    is_lower = bounded < memory.most_wanted
    next_memory = ScalingMemory(below_since=given.now, most_wanted=bounded) if is_lower else None
    return ScalingDecision(replicas=memory.most_wanted, reason=why, memory=next_memory)


def _remember(given: ScalingInput, wanted: int) -> ScalingMemory:
    before = given.memory
    if before is None or before.most_wanted >= given.current_replicas:  # the second: somebody else has scaled down
        return ScalingMemory(below_since=given.now, most_wanted=wanted)
    return ScalingMemory(below_since=before.below_since, most_wanted=max(before.most_wanted, wanted))


def _requests(demand: float) -> str:
    return f"{demand:g} request{'' if demand == 1 else 's'}"
