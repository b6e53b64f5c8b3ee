"""The lanes of long texts: bounded, and without work for those who have gone."""

import asyncio
import gc
import threading
import weakref

import pytest

from quire_server.frontend.text_lanes import LONG_CHARS, VERY_LONG_CHARS, TextLanes
from quire_server.frontend.text_limits import MAX_CUT_BYTES, TextLimits
from quire_server.shared.errors import ContextLengthError, QueueFullError


def run_story(story) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


async def turns(num: int = 20) -> None:
    for _ in range(num):
        await asyncio.sleep(0)


def test_what_waits_is_bounded_and_what_was_given_up_is_not_done() -> None:
    async def story() -> None:
        lanes = TextLanes(max_waiting=2)
        go, done = threading.Event(), []

        def work(number: int) -> None:
            go.wait()
            done.append(number)

        tasks = [asyncio.create_task(lanes.run(VERY_LONG_CHARS, lambda n=n: work(n))) for n in range(3)]
        await turns()
        with pytest.raises(QueueFullError) as caught:
            await lanes.run(VERY_LONG_CHARS, lambda: work(3))
        assert caught.value.retry_after_s
        tasks[1].cancel()
        await turns()
        tasks.append(asyncio.create_task(lanes.run(VERY_LONG_CHARS, lambda: work(4))))
        await turns()
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert done == [0, 2, 4]

    run_story(story())


def test_what_was_given_up_is_not_kept_until_its_turn() -> None:
    """Else clients that come and go fill the memory with their texts while one long text is read."""

    class Text:
        def read(self) -> None:
            raise AssertionError("nobody waits for this")

    async def story() -> None:
        lanes = TextLanes(max_waiting=2)
        go = threading.Event()
        slow = asyncio.create_task(lanes.run(VERY_LONG_CHARS, go.wait))
        text = Text()
        kept = weakref.ref(text)
        given_up = asyncio.create_task(lanes.run(VERY_LONG_CHARS, text.read))
        await turns()
        given_up.cancel()
        await asyncio.wait([given_up])
        del text, given_up
        gc.collect()
        is_kept, was_first_done = kept() is not None, slow.done()
        go.set()
        await slow
        assert (is_kept, was_first_done) == (False, False)

    run_story(story())


def test_long_work_does_not_wait_for_very_long_work() -> None:
    async def story() -> None:
        lanes = TextLanes(max_waiting=2)
        go = threading.Event()
        slow = asyncio.create_task(lanes.run(VERY_LONG_CHARS, go.wait))
        await turns()
        assert await lanes.run(LONG_CHARS, lambda: "long") == "long"
        assert await lanes.run(LONG_CHARS - 1, threading.current_thread) is threading.current_thread()
        assert not slow.done()
        go.set()
        await slow

    run_story(story())


def test_an_error_of_the_work_is_the_callers() -> None:
    async def story() -> None:
        with pytest.raises(ZeroDivisionError):
            await TextLanes(max_waiting=1).run(LONG_CHARS, lambda: 1 // 0)

    run_story(story())


@pytest.mark.parametrize(
    ("max_bytes_per_token", "is_cut", "max_bytes"),
    [(10, False, 1000), (10, True, MAX_CUT_BYTES), (None, False, MAX_CUT_BYTES), (10**6, True, 10**8)],
)
def test_limits_are_of_bytes(max_bytes_per_token: int | None, is_cut: bool, max_bytes: int) -> None:
    limits = TextLimits.of(100, max_bytes_per_token, is_cut=is_cut)
    limits.check("é" * (max_bytes // 2), "prompt")
    with pytest.raises(ContextLengthError, match="maximum context length is 100 tokens") as caught:
        limits.check("é" * (max_bytes // 2) + "a", "messages")
    assert caught.value.param == "messages"
