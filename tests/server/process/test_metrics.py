from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire_contract import metrics as names
from quire_contract.metrics import MetricKind
from quire_server.api_process.stats_log import StatsLogger
from quire_server.engine.border.messages import EngineReady, EngineStep
from quire_server.engine.output import SchedulerStats
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.frontend.metrics import Histogram, ServerMetrics
from quire_server.frontend.output_processor import CompletionDelta
from quire_server.shared.config import EngineConfig

MakeRequest = Callable[..., EngineRequest]


@pytest.fixture
def metrics(engine_config: EngineConfig) -> ServerMetrics:
    return ServerMetrics(engine_config)


def samples_of(metrics: ServerMetrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def total(metrics: ServerMetrics, name: str, **labels: str) -> float:
    wanted = set(labels.items())
    series = samples_of(metrics)[f"vllm:{name}"]
    return sum(value for key, value in series.items() if wanted <= set(key))


def delta(*token_ids: int, num_output_tokens: int, finish_reason: FinishReason | None = None) -> CompletionDelta:
    return CompletionDelta(
        request_id="r",
        text="",
        token_ids=token_ids,
        num_output_tokens=num_output_tokens,
        num_cached_tokens=2,
        finish_reason=finish_reason,
    )


def test_every_metric_of_the_contract_is_there_with_its_labels(metrics: ServerMetrics) -> None:
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    samples = samples_of(metrics)
    for metric in names.SERVER_METRICS:
        family_name = metric.name.removesuffix("_total") if metric.kind is MetricKind.COUNTER else metric.name
        assert families[family_name].type == metric.kind.value
        sample_name = f"{metric.name}_bucket" if metric.kind is MetricKind.HISTOGRAM else metric.name
        for labels in samples[sample_name]:
            assert {name for name, _ in labels} - {"le"} >= set(metric.labels)
    assert "process_resident_memory_bytes" in families
    assert dict(next(iter(samples["vllm:cache_config_info"])))["block_size"] == "16"


def test_engine_steps_set_gauges_and_counters(metrics: ServerMetrics) -> None:
    stats = SchedulerStats(
        num_running=3, num_waiting=2, kv_cache_usage=0.5, prefix_cache_queries=100, prefix_cache_hits=40,
        num_preemptions=1, num_steps=1, step_num_tokens=9,
    )  # fmt: skip
    metrics.on_step(EngineStep(stats=stats, time=1.0))
    metrics.on_step(EngineStep(stats=stats, time=2.0))  # a heartbeat is no step
    assert total(metrics, "num_requests_running") == 3
    assert total(metrics, "num_requests_waiting") == 2
    assert total(metrics, "num_requests_waiting_by_reason", reason="capacity") == 2
    assert total(metrics, "kv_cache_usage_perc") == 0.5
    assert total(metrics, "prefix_cache_queries_total") == 100
    assert total(metrics, "prefix_cache_hits_total") == 40
    assert total(metrics, "num_preemptions_total") == 1
    assert total(metrics, "iteration_tokens_total_count") == 1
    assert total(metrics, "iteration_tokens_total_sum") == 9


def test_a_requests_life_in_times(metrics: ServerMetrics, make_request: MakeRequest) -> None:
    timer = metrics.start_request(make_request("r", 10))  # arrives at 50
    timer.observe(delta(1, num_output_tokens=1), 51.0, 53.0)
    timer.observe(delta(2, num_output_tokens=2), None, 53.5)
    timer.observe(delta(num_output_tokens=2), None, 53.6)
    timer.observe(delta(3, 4, num_output_tokens=4, finish_reason=FinishReason.STOP), None, 54.0)
    timer.close(99.0)
    assert total(metrics, "time_to_first_token_seconds_sum") == 3.0
    assert total(metrics, "inter_token_latency_seconds_sum") == 1.0
    assert total(metrics, "inter_token_latency_seconds_count") == 2
    assert total(metrics, "e2e_request_latency_seconds_sum") == 4.0
    assert total(metrics, "request_queue_time_seconds_sum") == 1.0
    assert total(metrics, "request_prefill_time_seconds_sum") == 2.0
    assert total(metrics, "request_decode_time_seconds_sum") == 1.0
    assert total(metrics, "request_inference_time_seconds_sum") == 3.0
    assert total(metrics, "request_time_per_output_token_seconds_sum") == pytest.approx(1 / 3)
    assert total(metrics, "prompt_tokens_total") == 10
    assert total(metrics, "prompt_tokens_cached_total") == 2
    assert total(metrics, "prompt_tokens_by_source_total", source="local_compute") == 8
    assert total(metrics, "request_prefill_kv_computed_tokens_sum") == 8
    assert total(metrics, "generation_tokens_total") == 4
    assert total(metrics, "request_generation_tokens_sum") == 4
    assert total(metrics, "request_params_max_tokens_sum") == 1000
    assert total(metrics, "request_success_total", finished_reason="stop") == 1
    assert total(metrics, "request_success_total") == 1


def test_a_client_that_went_away_is_an_abort(metrics: ServerMetrics, make_request: MakeRequest) -> None:
    timer = metrics.start_request(make_request("r"))
    timer.close(52.0)
    timer.close(53.0)
    assert total(metrics, "request_success_total", finished_reason="abort") == 1
    assert total(metrics, "e2e_request_latency_seconds_sum") == 2.0
    assert total(metrics, "time_to_first_token_seconds_count") == 0


def test_buckets_hold_what_is_at_most_their_bound(metrics: ServerMetrics) -> None:
    histogram = Histogram((1, 2.5, 10))
    for value in (0.5, 1, 1.1, 2.5, 10.5):
        histogram.observe(value)
    assert histogram.render("h", 'a="b"') == [
        'h_bucket{a="b",le="1.0"} 2.0',
        'h_bucket{a="b",le="2.5"} 4.0',
        'h_bucket{a="b",le="10.0"} 4.0',
        'h_bucket{a="b",le="+Inf"} 5.0',
        'h_count{a="b"} 5.0',
        'h_sum{a="b"} 15.6',
    ]


def test_a_prompt_that_is_only_scored_is_counted_once(metrics: ServerMetrics, make_request: MakeRequest) -> None:
    timer = metrics.start_request(make_request("r", 50))
    timer.observe(delta(num_output_tokens=0), 51.0, 52.0)
    timer.observe(delta(num_output_tokens=0, finish_reason=FinishReason.LENGTH), None, 53.0)
    assert total(metrics, "prompt_tokens_total") == 50
    assert total(metrics, "generation_tokens_total") == 0
    assert total(metrics, "time_to_first_token_seconds_count") == 0
    assert total(metrics, "request_success_total", finished_reason="length") == 1
    refused = metrics.start_request(make_request("s", 50))
    refused.observe(delta(num_output_tokens=0, finish_reason=FinishReason.ERROR), None, 53.0)
    assert total(metrics, "prompt_tokens_total") == 50


def test_token_buckets_end_at_the_context_length(metrics: ServerMetrics) -> None:
    ready = {"vocab_size": 1, "num_blocks": 7, "block_size": 32, "dtype": "", "device": "", "weights_bytes": 0}
    metrics.on_ready(EngineReady(max_model_len=300, kv_cache_bytes=1, load_seconds={}, **ready))  # type: ignore[arg-type]
    bounds = [dict(key)["le"] for key in samples_of(metrics)["vllm:request_prompt_tokens_bucket"]]
    assert bounds[-2:] == ["200.0", "+Inf"]
    assert 'num_gpu_blocks="7"' in metrics.render().decode()


def test_the_line_about_throughput_has_vllms_words(metrics: ServerMetrics, make_request: MakeRequest) -> None:
    logger = StatsLogger(0.0)
    assert logger.line(metrics, SchedulerStats(), 10.0) is None
    metrics.start_request(make_request("r", 50)).observe(delta(1, 2, num_output_tokens=2), 51.0, 52.0)
    stats = SchedulerStats(
        num_running=1, num_waiting=4, kv_cache_usage=0.123, prefix_cache_queries=8, prefix_cache_hits=2
    )
    assert logger.line(metrics, stats, 20.0) == (
        "Engine 000: Avg prompt throughput: 5.0 tokens/s, Avg generation throughput: 0.2 tokens/s, Running: 1 reqs, "
        "Waiting: 4 reqs, GPU KV cache usage: 12.3%, Prefix cache hit rate: 25.0%"
    )
    idle = SchedulerStats(prefix_cache_queries=8, prefix_cache_hits=2)
    last = logger.line(metrics, idle, 30.0)  # once more, to say that it is over
    assert last is not None
    assert "Running: 0 reqs" in last
    assert "hit rate: 0.0%" in last
    assert logger.line(metrics, idle, 40.0) is None
