import pytest

from quire_server.engine.border.queue_limit import MAX_RETRY_AFTER_S, UNKNOWN_RATE_RETRY_AFTER_S, QueueLimit
from quire_server.engine.output import SchedulerStats
from quire_server.shared.errors import QueueFullError


@pytest.mark.parametrize(
    ("num_open", "num_running", "num_waiting", "is_refused"),
    [
        (0, 0, 0, False),
        (11, 0, 0, False),  # a burst: eight find seats, three of four wait
        (12, 0, 0, True),
        (12, 8, 4, True),
        (11, 8, 3, False),
        (6, 2, 4, True),  # the cache is full: what waits does not get the free seats
        (5, 2, 3, False),
    ],
)
def test_as_many_may_wait_as_may_wait(num_open: int, num_running: int, num_waiting: int, is_refused: bool) -> None:
    limit = QueueLimit(max_num_queued_reqs=4, max_num_seqs=8)
    stats = SchedulerStats(num_running=num_running, num_waiting=num_waiting)
    if is_refused:
        with pytest.raises(QueueFullError, match="4 requests are waiting"):
            limit.check(num_open, stats, 0.0)
    else:
        limit.check(num_open, stats, 0.0)


def test_the_time_to_come_back_is_queue_over_drain_rate() -> None:
    limit = QueueLimit(max_num_queued_reqs=4, max_num_seqs=8)
    assert limit.retry_after_s(10, 100.0) == UNKNOWN_RATE_RETRY_AFTER_S
    for second in range(20):
        limit.record_finish(100.0 + second / 2)  # two a second
    assert limit.retry_after_s(10, 110.0) == 5.0
    assert limit.retry_after_s(1, 110.0) == 1.0
    assert limit.retry_after_s(10**6, 110.0) == MAX_RETRY_AFTER_S
    assert limit.retry_after_s(10, 1000.0) == UNKNOWN_RATE_RETRY_AFTER_S  # long ago
