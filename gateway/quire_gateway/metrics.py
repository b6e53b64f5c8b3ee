"""The gateway's Prometheus metrics. Gauges are read from the state when they are scraped, never kept beside it."""

import asyncio
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quire_contract import metrics as names
from quire_gateway.backends import Backends, Model
from quire_gateway.demand import DemandTable

LABELS = ("namespace", "name")


class GatewayMetrics(Collector):
    """Request counts and durations, and demand by model."""

    def __init__(self, registry: CollectorRegistry, backends: Backends, demands: DemandTable) -> None:
        self._backends = backends
        self._demands = demands
        self._requests = Counter(
            names.GATEWAY_REQUESTS, "Requests answered, by status code.", [*LABELS, "code"], registry=registry
        )
        self._duration = Histogram(
            names.GATEWAY_REQUEST_DURATION,
            "Seconds from a request's head to the last byte of its answer.",
            LABELS,
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
            registry=registry,
        )
        registry.register(self)

    def observe(self, model: Model, status: int, seconds: float) -> None:
        self._requests.labels(model.namespace, model.name, str(status)).inc()
        self._duration.labels(model.namespace, model.name).observe(seconds)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        now = asyncio.get_running_loop().time()
        waiting = GaugeMetricFamily(names.GATEWAY_REQUESTS_WAITING, "Requests held for a cold model.", labels=LABELS)
        in_flight = GaugeMetricFamily(names.GATEWAY_REQUESTS_IN_FLIGHT, "Requests at a replica.", labels=LABELS)
        demand = GaugeMetricFamily(names.GATEWAY_DEMAND, "Waiting, in flight, and leases.", labels=LABELS)
        ready = GaugeMetricFamily(names.GATEWAY_BACKENDS_READY, "Replicas that answer.", labels=LABELS)
        for model in self._backends.models():
            key = (model.namespace, model.name)
            of_model = self._demands[model.key]
            waiting.add_metric(key, of_model.waiting)
            in_flight.add_metric(key, of_model.in_flight)
            demand.add_metric(key, of_model.total(now))
            ready.add_metric(key, len(model.backends))
        return waiting, in_flight, demand, ready
