"""The metrics as data: a client library can register them all, and they are exported under their own names."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from quire_contract import metrics
from quire_contract.metrics import Metric, MetricKind, token_buckets


def test_names_are_vllms_and_each_is_there_once() -> None:
    exported = [metric.name for metric in metrics.SERVER_METRICS]
    assert len(set(exported)) == len(exported)
    ours = {metrics.REQUEST_IGNORED_FIELDS.name}
    assert all(name.startswith("quire:" if name in ours else "vllm:") for name in exported)
    assert {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= set(exported)


@pytest.mark.parametrize("metric", metrics.SERVER_METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_complete(metric: Metric) -> None:
    assert metric.help.endswith(".")
    assert metric.name.endswith("_total") or metric.kind is not MetricKind.COUNTER
    has_buckets = bool(metric.buckets) or metric.is_in_tokens
    assert has_buckets == (metric.kind is MetricKind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    if metric is not metrics.CACHE_CONFIG_INFO:
        assert metric.labels[:2] == metrics.SERVER_LABELS


def test_a_client_library_exports_them_under_their_names() -> None:
    registry = CollectorRegistry()
    for metric in metrics.SERVER_METRICS:
        if metric.kind is MetricKind.COUNTER:
            Counter(metric.name, metric.help, metric.labels, registry=registry).labels(*metric.labels).inc()
        elif metric.kind is MetricKind.GAUGE:
            labels = metric.labels or ("block_size",)
            Gauge(metric.name, metric.help, labels, registry=registry).labels(*labels).set(1)
        else:
            buckets = token_buckets(4096) if metric.is_in_tokens else metric.buckets
            histogram = Histogram(metric.name, metric.help, metric.labels, buckets=buckets, registry=registry)
            histogram.labels(*metric.labels).observe(1)
    text = generate_latest(registry).decode()
    for metric in metrics.SERVER_METRICS:
        suffix = "_bucket" if metric.kind is MetricKind.HISTOGRAM else ""
        assert f"\n{metric.name}{suffix}{{" in text


@pytest.mark.parametrize(
    ("max_model_len", "buckets"),
    [
        (1, (1.0,)),
        (9, (1.0, 2.0, 5.0)),
        (2048, (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)),
    ],
)
def test_token_buckets_go_to_the_context_length(max_model_len: int, buckets: tuple[float, ...]) -> None:
    assert token_buckets(max_model_len) == buckets
