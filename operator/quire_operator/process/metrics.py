"""The operator's own metrics, for Prometheus.

One `Metrics` per process, with a registry of its own. Knows nothing of what it counts; gauges that are cheap to look up
are looked up when somebody asks.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_RECONCILE_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What is looked up at each scrape."""

    is_leader: bool = False
    queue_depth: int = 0
    queue_age_s: float = 0.0
    watch_ages_s: tuple[tuple[str, float], ...] = ()
    """By plural of the kind."""
    phases: tuple[str, ...] = ()
    """`status.phase` of each LLMDeployment."""


class Metrics:
    """Everything that `/metrics` says.

    Args:
        read: looks up the gauges.
    """

    def __init__(self, read: Callable[[], Readings]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._reconcile_seconds = Histogram(
            "quire_operator_reconcile_seconds",
            "Time that one reconcile of one LLMDeployment took.",
            buckets=_RECONCILE_BUCKETS,
            registry=self.registry,
        )
        self._reconciles = Counter(
            "quire_operator_reconciles_total", "Reconciles, by result.", ("result",), registry=self.registry
        )
        self._api_calls = Counter(
            "quire_operator_api_calls_total",
            "Requests to the API server, by verb, resource and HTTP status (0: no answer).",
            ("verb", "kind", "code"),
            registry=self.registry,
        )
        self.registry.register(_ReadingsCollector(read))

    def count_reconcile(self, result: str, seconds: float) -> None:
        """Count one reconcile; `result` is `ok` or the class of the error."""
        self._reconcile_seconds.observe(seconds)
        self._reconciles.labels(result).inc()

    def count_api_call(self, verb: str, kind: str, code: int) -> None:
        """Count one request to the API server."""
        self._api_calls.labels(verb, kind, str(code)).inc()

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self.registry)


class _ReadingsCollector(Collector):
    def __init__(self, read: Callable[[], Readings]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()  # else registering would look everything up

    def collect(self) -> Iterator[Metric]:
        readings = self._read()
        for name, text, value in (
            ("leader", "Whether this process holds the lease.", float(readings.is_leader)),
            ("queue_depth", "Keys that wait for a worker.", float(readings.queue_depth)),
            ("queue_oldest_seconds", "How long the oldest key has waited or been worked on.", readings.queue_age_s),
        ):
            yield GaugeMetricFamily(f"quire_operator_{name}", text, value=value)
        ages = GaugeMetricFamily(
            "quire_operator_watch_age_seconds", "Since when the watch of a kind has shown no life.", labels=("kind",)
        )
        oldest: dict[str, float] = {}
        for kind, age_s in readings.watch_ages_s:
            oldest[kind] = max(age_s, oldest.get(kind, 0.0))
        for kind, age_s in sorted(oldest.items()):
            ages.add_metric((kind,), age_s)
        yield ages
        phases = GaugeMetricFamily("quire_operator_llmdeployments", "LLMDeployments, by phase.", labels=("phase",))
        for phase, count in sorted(Tally(readings.phases).items()):
            phases.add_metric((phase,), count)
        yield phases
