"""The work queue."""

import asyncio

import pytest
from virtual_time import now, run

from quire_kube.api import NameTakenError
from quire_operator.process.queue import MAX_BACKOFF_S, WorkQueue


class Worker:
    """Records when what was worked on; takes `takes_s` and fails as often as told."""

    def __init__(self, *, takes_s: float = 0.0, num_failures: int = 0, num_workers: int = 1) -> None:
        self.log: list[tuple[float, str]] = []
        self.takes_s = takes_s
        self.num_failures = num_failures
        self.error: Exception = RuntimeError("broken")
        self.again_s: float | None = None
        self.num_running = self.most_running = 0
        self.delays: list[float] = []
        self.queue: WorkQueue[str] = WorkQueue(self.work, num_workers=num_workers, on_error=self.on_error)

    async def work(self, item: str) -> float | None:
        self.log.append((now(), item))
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await asyncio.sleep(self.takes_s)
        self.num_running -= 1
        if self.num_failures:
            self.num_failures -= 1
            raise self.error
        again_s, self.again_s = self.again_s, None
        return again_s

    def on_error(self, item: str, error: Exception, delay_s: float) -> None:
        assert error is self.error
        self.delays.append(delay_s)

    async def run_for(self, duration_s: float) -> None:
        running = asyncio.ensure_future(self.queue.run())
        await asyncio.sleep(duration_s)
        self.queue.stop()
        await running


def test_a_key_waits_once() -> None:
    async def main() -> None:
        worker = Worker()
        for item in ("a", "b", "a", "a"):
            worker.queue.add(item)
        assert worker.queue.depth == 2
        await worker.run_for(1)
        assert [item for _, item in worker.log] == ["a", "b"]

    run(main())


def test_added_while_worked_on_runs_once_more_and_never_twice_at_a_time() -> None:
    async def main() -> None:
        worker = Worker(takes_s=10, num_workers=3)
        worker.queue.add("a")
        loop = asyncio.get_running_loop()
        for at in (1, 2, 3):
            loop.call_later(at, worker.queue.add, "a")
        await worker.run_for(100)
        assert worker.log == [(0, "a"), (10, "a")]
        assert worker.most_running == 1

    run(main())


def test_workers_work_side_by_side() -> None:
    async def main() -> None:
        worker = Worker(takes_s=10, num_workers=2)
        for item in "abc":
            worker.queue.add(item)
        await worker.run_for(30)
        assert worker.log == [(0, "a"), (0, "b"), (10, "c")]

    run(main())


def test_failures_back_off_doubling_to_the_most_and_success_forgets_them() -> None:
    async def main() -> None:
        worker = Worker(num_failures=11)
        worker.queue.add("a")
        await worker.run_for(5000)
        assert worker.delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, MAX_BACKOFF_S, MAX_BACKOFF_S]
        assert len(worker.log) == 12
        worker.delays.clear()

    async def again() -> None:
        worker = Worker(num_failures=3)
        worker.queue.add("a")
        loop = asyncio.get_running_loop()

        def fail_again() -> None:
            worker.num_failures = 1
            worker.queue.add("a")

        loop.call_later(100, fail_again)
        await worker.run_for(200)
        assert worker.delays == [1, 2, 4, 1]

    run(main())
    run(again())


def test_a_server_that_says_when_to_come_back_is_obeyed() -> None:
    async def main() -> None:
        worker = Worker(num_failures=1)
        worker.error.retry_after_s = 30.0  # type: ignore[attr-defined]
        worker.queue.add("a")
        await worker.run_for(60)
        assert [time for time, _ in worker.log] == [0, 30]

    run(main())


def test_an_event_does_not_wait_for_the_back_off() -> None:
    async def main() -> None:
        worker = Worker(num_failures=6)
        worker.queue.add("a")
        asyncio.get_running_loop().call_later(20, worker.queue.add, "a")  # failures at 0, 1, 3, 7, 15: due at 31
        await worker.run_for(21)
        assert worker.log[-1][0] == 20

    run(main())


@pytest.mark.parametrize(("delays", "expected"), [((5, 3), [3]), ((3, 5), [3]), ((3, 3), [3])])
def test_sooner_wins(delays: tuple[float, ...], expected: list[float]) -> None:
    async def main() -> None:
        worker = Worker()
        for delay_s in delays:
            worker.queue.add_after("a", delay_s)
        assert worker.queue.depth == 0
        await worker.run_for(20)
        assert [time for time, _ in worker.log] == expected

    run(main())


def test_work_may_ask_to_be_done_again() -> None:
    async def main() -> None:
        worker = Worker()
        worker.again_s = 7
        worker.queue.add("a")
        await worker.run_for(20)
        assert [time for time, _ in worker.log] == [0, 7]

    run(main())


def test_age_is_of_the_oldest_that_waits_or_runs() -> None:
    async def main() -> None:
        worker = Worker(takes_s=50)
        assert worker.queue.age_s == 0
        worker.queue.add("a")
        worker.queue.add("b")
        running = asyncio.ensure_future(worker.queue.run())
        await asyncio.sleep(30)
        assert (worker.queue.age_s, worker.queue.depth) == (30, 1)
        await asyncio.sleep(30)
        assert worker.queue.age_s == 10  # b, worked on since 50
        worker.queue.stop()
        await running

    run(main())


def test_stop_ends_what_runs_and_takes_up_nothing_more() -> None:
    async def main() -> None:
        worker = Worker(takes_s=10)
        worker.queue.add("a")
        worker.queue.add("b")
        worker.queue.add_after("c", 5)
        await worker.run_for(1)
        assert now() == 10
        assert [item for _, item in worker.log] == ["a"]
        assert worker.num_running == 0

    run(main())


def test_what_nothing_will_tell_of_is_looked_at_within_its_time() -> None:
    """NameTaken: an object of somebody else's is not watched, so its end is found out by looking."""

    async def main() -> None:
        worker = Worker(num_failures=6)
        worker.error = NameTakenError("taken")
        worker.queue.add("a")
        await worker.run_for(30)
        assert [time for time, _ in worker.log] == [0, 1, 3, 7, 12, 17, 22]

    run(main())
