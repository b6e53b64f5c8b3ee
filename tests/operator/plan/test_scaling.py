"""The scaling function: what it does in each situation, and its invariants over any load."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quire_operator.plan.scaling import ScalingInput, ScalingMemory, decide

QUIET = ScalingInput(
    demand=0,
    target_per_replica=8,
    min_replicas=0,
    max_replicas=4,
    current_replicas=1,
    pending_replicas=0,
    last_demand_time=1000.0,
    scale_down_delay_s=300.0,
    idle_to_zero_after_s=600.0,
    now=1000.0,
)


def _decide(**changes: Any) -> tuple[int, str]:
    decision = decide(replace(QUIET, **changes))
    return decision.replicas, decision.reason


@pytest.mark.parametrize(
    ("changes", "replicas", "reason"),
    [
        ({"current_replicas": 0, "demand": 1}, 1, "woken by 1 request"),
        ({"current_replicas": 0, "demand": 500}, 1, "woken by 500 requests"),
        ({"current_replicas": 0}, 0, "no demand"),
        ({"now": 1599.0}, 1, "no demand"),
        ({"now": 1600.0}, 0, "idle for 600 s"),
        ({"now": 1600.0, "current_replicas": 4}, 0, "idle for 600 s"),
        ({"now": 9999.0, "min_replicas": 1}, 1, "no demand"),
        ({"now": 9999.0, "idle_to_zero_after_s": None}, 1, "no demand"),
        ({"now": 9999.0, "demand": 1}, 1, "1 request at 8 per replica"),
        ({"demand": 8}, 1, "8 requests at 8 per replica"),
        ({"demand": 9}, 2, "9 requests at 8 per replica"),
        ({"demand": 999}, 4, "999 requests at 8 per replica"),
        ({"demand": 999, "current_replicas": 4}, 4, "999 requests at 8 per replica, max 4"),
        ({"demand": 30, "pending_replicas": 1}, 1, "30 requests at 8 per replica, 1 still starting"),
        ({"demand": 0.3, "target_per_replica": 0.1, "current_replicas": 3}, 3, "0.3 requests at 0.1 per replica"),
        ({"demand": 1, "current_replicas": 3}, 3, "1 request at 8 per replica, fewer in 300 s"),
        ({"min_replicas": 2}, 2, "min 2, max 4"),
        ({"current_replicas": 9, "demand": 99}, 4, "min 0, max 4"),
    ],
)
def test_one_decision(changes: dict[str, Any], replicas: int, reason: str) -> None:
    assert _decide(**changes) == (replicas, reason)


def test_fewer_replicas_only_after_the_delay_and_only_down_to_what_was_needed() -> None:
    state = replace(QUIET, current_replicas=4, demand=10)
    for now, demand, expected in [
        (0, 10, 4),
        (100, 20, 4),
        (200, 5, 4),
        (299, 5, 4),
        (300, 5, 3),
        (301, 5, 3),
        (599, 5, 3),
    ]:
        decision = decide(replace(state, now=float(now), demand=demand, last_demand_time=float(now)))
        assert decision.replicas == expected, now
        state = replace(state, current_replicas=decision.replicas, memory=decision.memory)
    assert decide(replace(state, now=600.0, demand=5, last_demand_time=600.0)).replicas == 1


def test_a_load_that_returns_within_the_delay_starts_it_again() -> None:
    before = ScalingMemory(below_since=700.0, most_wanted=1)
    decision = decide(replace(QUIET, current_replicas=2, demand=16, memory=before))
    assert (decision.replicas, decision.memory) == (2, None)


def test_memory_of_more_replicas_than_there_are_is_dropped() -> None:
    """Somebody has scaled down by hand; the next decision must not scale up without demand."""
    stale = ScalingMemory(below_since=0.0, most_wanted=3)
    decision = decide(replace(QUIET, current_replicas=2, demand=1, memory=stale))
    assert decision.replicas == 2
    assert decision.memory == ScalingMemory(below_since=1000.0, most_wanted=1)


@pytest.mark.parametrize(
    "changes",
    [{"min_replicas": 5}, {"min_replicas": -1}, {"max_replicas": 0}, {"target_per_replica": 0}],
)
def test_bounds_that_cannot_be_kept_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"replica"):
        replace(QUIET, **changes)


@st.composite
def inputs(draw: st.DrawFn) -> ScalingInput:
    least = draw(st.integers(0, 5))
    most = draw(st.integers(max(least, 1), 10))
    current = draw(st.integers(0, 12))
    now = draw(st.floats(0, 10_000))
    memory = st.builds(ScalingMemory, below_since=st.floats(0, now), most_wanted=st.integers(1, 12))
    return ScalingInput(
        demand=draw(st.one_of(st.just(0.0), st.floats(0, 200))),
        target_per_replica=draw(st.floats(0.5, 50)),
        min_replicas=least,
        max_replicas=most,
        current_replicas=current,
        pending_replicas=draw(st.integers(0, current)),
        last_demand_time=draw(st.floats(0, now)),
        scale_down_delay_s=draw(st.floats(0, 600)),
        idle_to_zero_after_s=draw(st.one_of(st.none(), st.floats(0, 600))),
        now=now,
        memory=draw(st.one_of(st.none(), memory)),
    )


@given(inputs())
def test_within_bounds(given_input: ScalingInput) -> None:
    assert given_input.min_replicas <= decide(given_input).replicas <= given_input.max_replicas


@given(inputs(), st.floats(0, 200))
def test_more_demand_never_gives_fewer_replicas(given_input: ScalingInput, extra: float) -> None:
    more = replace(given_input, demand=given_input.demand + extra)
    assert decide(more).replicas >= decide(given_input).replicas


@given(inputs())
def test_zero_only_where_it_is_allowed_and_long_idle(given_input: ScalingInput) -> None:
    if decide(given_input).replicas == 0:
        assert given_input.min_replicas == 0
        assert given_input.demand == 0
        idle_s = given_input.now - given_input.last_demand_time
        was_zero = given_input.current_replicas == 0
        assert was_zero or (given_input.idle_to_zero_after_s is not None and idle_s >= given_input.idle_to_zero_after_s)


@given(inputs())
def test_demand_wakes_at_once_whatever_is_remembered(given_input: ScalingInput) -> None:
    asleep = replace(given_input, current_replicas=0, pending_replicas=0, demand=max(1.0, given_input.demand))
    assert decide(asleep).replicas == max(1, given_input.min_replicas)


@given(inputs())
def test_pending_replicas_freeze_scaling_up(given_input: ScalingInput) -> None:
    least, most = given_input.min_replicas, given_input.max_replicas
    current = min(max(given_input.current_replicas, least), most)
    loading = replace(given_input, current_replicas=current, pending_replicas=1)
    if current > 0:
        assert decide(loading).replicas <= current


class ScalingMachine(RuleBasedStateMachine):
    """Time passes, load comes and goes, replicas become ready; the function is asked every few seconds."""

    DELAY_S, IDLE_S = 60.0, 150.0

    @initialize(least=st.integers(0, 2), most=st.integers(2, 6))
    def start(self, least: int, most: int) -> None:
        self.least, self.most, self.now = least, most, 0.0
        self.current, self.ready = max(least, 1), 0
        self.last_demand = 0.0
        self.memory: ScalingMemory | None = None
        self.wanted: list[tuple[float, int]] = []
        self.ups: list[float] = []

    @rule(demand=st.sampled_from([0, 0, 1, 4, 9, 20, 60]), seconds=st.sampled_from([1.0, 5.0, 20.0, 61.0]))
    def ask(self, demand: int, seconds: float) -> None:
        self.now += seconds
        if demand:
            self.last_demand = self.now
        decision = decide(
            ScalingInput(
                demand=demand,
                target_per_replica=8,
                min_replicas=self.least,
                max_replicas=self.most,
                current_replicas=self.current,
                pending_replicas=self.current - self.ready,
                last_demand_time=self.last_demand,
                scale_down_delay_s=self.DELAY_S,
                idle_to_zero_after_s=self.IDLE_S if self.least == 0 else None,
                now=self.now,
                memory=self.memory,
            )
        )
        needed = min(max(-(-demand // 8), self.least, 1), self.most)
        self.wanted.append((self.now, needed))
        if 0 < decision.replicas < self.current:
            within = [count for time, count in self.wanted if time > self.now - self.DELAY_S]
            assert decision.replicas >= max(within), "below what the last seconds needed"
            assert all(time <= self.now - self.DELAY_S for time in self.ups), "down within the delay of an up"
        if decision.replicas > self.current:
            assert self.current == 0 or self.ready == self.current, "up while replicas were starting"
            self.ups.append(self.now)
        self.current, self.memory = decision.replicas, decision.memory
        self.ready = min(self.ready, self.current)

    @rule()
    def become_ready(self) -> None:
        self.ready = self.current

    @invariant()
    def stays_within_bounds(self) -> None:
        if hasattr(self, "current"):
            assert self.least <= self.current <= self.most


TestScalingMachine = ScalingMachine.TestCase
