"""The work queue: which keys are to be worked on, when, and how often after failures.

Knows no Kubernetes. A key waits at most once and is never worked on twice at a time: added while it is worked on, it
runs once more afterwards. Time is the event loop's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 300.0

Item = TypeVar("Item", bound=Hashable)


class WorkQueue(Generic[Item]):
    """Works on keys, `num_workers` at a time. All methods are for the event loop's thread.

    Args:
        work: does the work; returns after how many seconds to do it again, or None. Raises to be tried again later; an
            attribute `retry_after_s` of the exception makes that later still, `retry_within_s` never later than that.
        on_error: told of each failure and of how many seconds the key waits now.
    """

    def __init__(
        self,
        work: Callable[[Item], Awaitable[float | None]],
        *,
        num_workers: int = 4,
        on_error: Callable[[Item, Exception, float], None],
    ) -> None:
        self._work = work
        self._num_workers = num_workers
        self._on_error = on_error
        self._waiting: dict[Item, float] = {}  # since when; in the order of arrival
        self._running: dict[Item, float] = {}
        self._timers: dict[Item, asyncio.TimerHandle] = {}
        self._num_failures: dict[Item, int] = {}
        self._wake = asyncio.Event()
        self._is_stopping = False

    def add(self, item: Item) -> None:
        """Work on it as soon as a worker is free."""
        self._cancel_timer(item)
        self._waiting.setdefault(item, _now())
        self._wake.set()

    def add_after(self, item: Item, delay_s: float) -> None:
        """Work on it after `delay_s`, or when it was due anyway, if that is sooner."""
        timer = self._timers.get(item)
        is_sooner_due = timer is not None and timer.when() <= _now() + delay_s
        if item in self._waiting or is_sooner_due:
            return
        self._cancel_timer(item)
        self._timers[item] = asyncio.get_running_loop().call_later(delay_s, self.add, item)

    async def run(self) -> None:
        """Work until `stop`, and to the end of what is being worked on then. Cancelled, it drops that."""
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._num_workers):
                    workers.create_task(self._run_worker())
        finally:
            for item in tuple(self._timers):
                self._cancel_timer(item)

    def stop(self) -> None:
        """Take up nothing more."""
        self._is_stopping = True
        self._wake.set()

    @property
    def depth(self) -> int:
        """How many keys wait for a worker; those that wait for a time do not count."""
        return len(self._waiting)

    @property
    def age_s(self) -> float:
        """How long the oldest key has waited, or has been worked on."""
        return _now() - min((*self._waiting.values(), *self._running.values()), default=_now())

    async def _run_worker(self) -> None:
        while not self._is_stopping:
            item = next((item for item in self._waiting if item not in self._running), None)
            if item is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            del self._waiting[item]
            self._running[item] = _now()
            try:
                await self._run_once(item)
            finally:
                del self._running[item]
                self._wake.set()  # it may have been added meanwhile

    async def _run_once(self, item: Item) -> None:
        try:
            again_s = await self._work(item)
        except Exception as error:  # noqa: BLE001  one key's failure is not the others'
            self._num_failures[item] = num = self._num_failures.get(item, 0) + 1
            longest_s = getattr(error, "retry_within_s", None) or MAX_BACKOFF_S
            delay_s = min(FIRST_BACKOFF_S * 2 ** min(num - 1, 20), longest_s)
            delay_s = max(delay_s, getattr(error, "retry_after_s", None) or 0.0)
            self._on_error(item, error, delay_s)
            self.add_after(item, delay_s)
        else:
            self._num_failures.pop(item, None)
            if again_s is not None:
                self.add_after(item, again_s)

    def _cancel_timer(self, item: Item) -> None:
        timer = self._timers.pop(item, None)
        if timer is not None:
            timer.cancel()


def _now() -> float:
    return asyncio.get_running_loop().time()
