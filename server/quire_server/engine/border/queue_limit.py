"""How many requests may wait, and when a refused client should come back. Pure; the time is an argument."""

import math
from collections import deque

from quire_server.engine.output import SchedulerStats
from quire_server.shared.errors import QueueFullError

WINDOW_S = 60.0
"""How far back the drain rate looks."""
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 120.0
UNKNOWN_RATE_RETRY_AFTER_S = 5.0


class QueueLimit:
    """Refuses a request when as many wait as may wait."""

    def __init__(self, max_num_queued_reqs: int, max_num_seqs: int) -> None:
        self._max_num_queued_reqs = max_num_queued_reqs
        self._max_num_seqs = max_num_seqs
        self._finish_times: deque[float] = deque(maxlen=256)

    def record_finish(self, now: float) -> None:
        self._finish_times.append(now)

    def num_waiting(self, num_open: int, stats: SchedulerStats) -> int:
        """Estimate the queue, including requests that the engine has not told of yet.

        As long as the engine last said that nothing waits, what was sent since fills free seats first.
        """
        num_seats = stats.num_running if stats.num_waiting else max(stats.num_running, self._max_num_seqs)
        return max(0, num_open - num_seats)

    def check(self, num_open: int, stats: SchedulerStats, now: float) -> None:
        """Check that one more request may come.

        Raises:
            QueueFullError: as many wait as may wait; `retry_after_s` is how long that queue takes to drain.
        """
        if num_open - stats.num_running < self._max_num_queued_reqs:
            return  # the usual case
        num_waiting = self.num_waiting(num_open + 1, stats)
        if num_waiting > self._max_num_queued_reqs:
            raise QueueFullError(
                f"{num_waiting - 1} requests are waiting, and at most {self._max_num_queued_reqs} may"
                " (--max-num-queued-reqs).",
                retry_after_s=self.retry_after_s(num_waiting, now),
            )

    def retry_after_s(self, num_waiting: int, now: float) -> float:
        """Whole seconds in which the queue drains at the rate at which requests finished lately."""
        while self._finish_times and self._finish_times[0] < now - WINDOW_S:
            self._finish_times.popleft()
        if not self._finish_times:
            return UNKNOWN_RATE_RETRY_AFTER_S
        rate = len(self._finish_times) / max(now - self._finish_times[0], 1.0)
        return float(math.ceil(min(max(num_waiting / rate, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)))
