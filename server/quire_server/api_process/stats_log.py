"""The line that says every ten seconds what the engine does, in vLLM's words, because people scrape it."""

import asyncio
import logging
import time

from quire_server.engine.border.client import EngineClient
from quire_server.engine.output import SchedulerStats
from quire_server.frontend.metrics import ServerMetrics

log = logging.getLogger(__name__)

INTERVAL_S = 10.0


class StatsLogger:
    """Turns counters into rates between one line and the next. Silent while nothing happens."""

    def __init__(self, now: float) -> None:
        self._time = now
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._stats = SchedulerStats()
        self._was_idle = True

    def line(self, metrics: ServerMetrics, stats: SchedulerStats, now: float) -> str | None:
        """Return the line for the time since the last call; None if it would say that nothing goes on again."""
        elapsed_s = max(now - self._time, 1e-9)
        prompt_rate = (metrics.num_prompt_tokens - self._num_prompt_tokens) / elapsed_s
        generation_rate = (metrics.num_generation_tokens - self._num_generation_tokens) / elapsed_s
        queries = stats.prefix_cache_queries - self._stats.prefix_cache_queries
        hits = stats.prefix_cache_hits - self._stats.prefix_cache_hits
        is_idle = not (prompt_rate or generation_rate or stats.num_running or stats.num_waiting)
        is_news = not (is_idle and self._was_idle)
        self._time, self._stats, self._was_idle = now, stats, is_idle
        self._num_prompt_tokens, self._num_generation_tokens = metrics.num_prompt_tokens, metrics.num_generation_tokens
        if not is_news:
            return None
        return (
            f"Engine 000: Avg prompt throughput: {prompt_rate:.1f} tokens/s, "
            f"Avg generation throughput: {generation_rate:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"GPU KV cache usage: {100 * stats.kv_cache_usage:.1f}%, "
            f"Prefix cache hit rate: {100 * hits / queries if queries else 0.0:.1f}%"
        )


async def log_stats(metrics: ServerMetrics, client: EngineClient, interval_s: float = INTERVAL_S) -> None:
    """Log the line at every interval, until cancelled."""
    stats_logger = StatsLogger(time.monotonic())
    while True:
        await asyncio.sleep(interval_s)
        line = stats_logger.line(metrics, client.stats, time.monotonic())
        if line is not None:
            log.info("%s", line)
