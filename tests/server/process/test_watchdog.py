"""Silence, in virtual time: what the watchdog is told is all the time there is."""

import pytest

from quire_server.engine.border.watchdog import Watchdog


def ticks_to_the_verdict(watchdog: Watchdog, tick_s: float = 1.0) -> float:
    """Seconds of silence from now on until it is too long."""
    for number in range(1, 100_000):
        if watchdog.tick(tick_s):
            return number * tick_s
    raise AssertionError("it waits for ever")


def awake(heartbeat_timeout_s: float = 60.0) -> Watchdog:
    watchdog = Watchdog(heartbeat_timeout_s)
    watchdog.is_awake = True
    return watchdog


def test_silence_longer_than_a_heartbeat_is_a_verdict() -> None:
    watchdog = awake()
    assert ticks_to_the_verdict(watchdog) == 60.0
    assert watchdog.verdict == "The engine loop has said nothing for 60 s."


def test_an_engine_that_loads_may_be_silent() -> None:
    watchdog = Watchdog(1.0)
    assert not any(watchdog.tick(1.0) for _ in range(10_000))
    watchdog.hear()
    watchdog.is_awake = True
    assert ticks_to_the_verdict(watchdog) == 2.0  # the tick in which it was heard does not count


def test_every_message_begins_anew() -> None:
    watchdog = awake(3.0)
    for _ in range(1000):
        watchdog.hear()
        assert not watchdog.tick(1.0)
        assert not watchdog.tick(1.0)
        assert not watchdog.tick(1.0)
    assert watchdog.tick(1.0)


@pytest.mark.parametrize(("max_silence_s", "patience_s"), [(600.0, 600.0), (60.0, 60.0), (5.0, 60.0), (0.0, 60.0)])
def test_an_announced_silence_is_waited_for(max_silence_s: float, patience_s: float) -> None:
    watchdog = awake()
    watchdog.hear(max_silence_s, "capturing CUDA graphs")
    watchdog.tick(1.0)
    assert ticks_to_the_verdict(watchdog) == patience_s
    assert watchdog.verdict.endswith(f"said nothing for {patience_s:.0f} s (in capturing CUDA graphs).")


def test_an_announcement_holds_until_the_next_message() -> None:
    watchdog = awake()
    watchdog.hear(600.0, "a step")
    assert not any(watchdog.tick(1.0) for _ in range(500))
    watchdog.hear()
    watchdog.tick(1.0)
    assert ticks_to_the_verdict(watchdog) == 60.0
    assert "a step" not in watchdog.verdict


def test_a_suspended_machine_is_one_tick() -> None:
    """However long the wall clock says it was: nobody ticked meanwhile."""
    watchdog = awake()
    assert not watchdog.tick(1.0)
    assert watchdog.silence_s == 1.0
