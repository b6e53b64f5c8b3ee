"""Every metric that a Quire process exports, as data.

The server's metrics have vLLM's names, labels and buckets (v0.26), because autoscalers, endpoint pickers and dashboards
read those; only metrics that this server can fill honestly are here, and what vLLM does not count begins with `quire:`.
Names are as they appear on `/metrics`; a client library that appends `_total` to counters itself takes it off first.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class MetricKind(StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric family."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    """In order. Empty for `cache_config_info`, whose labels are the fields of the cache configuration."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without +Inf."""
    is_in_tokens: bool = False
    """The buckets depend on the model: use `token_buckets(max_model_len)`."""


SERVER_LABELS: Final = ("model_name", "engine")
"""On every series of the server; `engine` is the data-parallel rank as a string."""

_LATENCY_BUCKETS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_PER_TOKEN_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITERATION_BUCKETS: Final = (1.0, *(8.0 * 2**i for i in range(12)))


def token_buckets(max_model_len: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, 20, 50, … up to the context length."""
    buckets: list[float] = []
    decade = 1
    while decade <= max_model_len:
        buckets += [float(decade * step) for step in (1, 2, 5) if decade * step <= max_model_len]
        decade *= 10
    return tuple(buckets)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=f"vllm:{name}", kind=MetricKind.GAUGE, help=text, labels=(*SERVER_LABELS, *labels))


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=f"vllm:{name}", kind=MetricKind.COUNTER, help=text, labels=(*SERVER_LABELS, *labels))


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=f"vllm:{name}", kind=MetricKind.HISTOGRAM, help=text, labels=SERVER_LABELS, buckets=buckets)


def _token_histogram(name: str, text: str) -> Metric:
    return Metric(name=f"vllm:{name}", kind=MetricKind.HISTOGRAM, help=text, labels=SERVER_LABELS, is_in_tokens=True)


NUM_REQUESTS_RUNNING: Final = _gauge("num_requests_running", "Requests in the execution batch.")
NUM_REQUESTS_WAITING: Final = _gauge("num_requests_waiting", "Requests that wait to be scheduled.")
NUM_REQUESTS_WAITING_BY_REASON: Final = _gauge(
    "num_requests_waiting_by_reason", "Requests that wait to be scheduled, by reason (capacity).", "reason"
)
KV_CACHE_USAGE_PERC: Final = _gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
CACHE_CONFIG_INFO: Final = Metric(
    name="vllm:cache_config_info", kind=MetricKind.GAUGE, help="Configuration of the KV cache, as labels."
)
PREFIX_CACHE_QUERIES: Final = _counter("prefix_cache_queries_total", "Prefix cache queries, in number of tokens.")
PREFIX_CACHE_HITS: Final = _counter("prefix_cache_hits_total", "Prefix cache hits, in number of tokens.")
NUM_PREEMPTIONS: Final = _counter("num_preemptions_total", "Preemptions by the engine.")
PROMPT_TOKENS: Final = _counter("prompt_tokens_total", "Prefill tokens processed.")
GENERATION_TOKENS: Final = _counter("generation_tokens_total", "Generation tokens processed.")
PROMPT_TOKENS_BY_SOURCE: Final = _counter(
    "prompt_tokens_by_source_total", "Prompt tokens by source (local_compute, local_cache_hit).", "source"
)
PROMPT_TOKENS_CACHED: Final = _counter("prompt_tokens_cached_total", "Prompt tokens found in the prefix cache.")
REQUEST_SUCCESS: Final = _counter("request_success_total", "Requests ended, by reason.", "finished_reason")
OTHER_FIELD: Final = "other"
REQUEST_IGNORED_FIELDS: Final = Metric(
    name="quire:request_ignored_fields_total",
    kind=MetricKind.COUNTER,
    help="Request fields that were ignored, by field; other: any that no server is known for.",
    labels=(*SERVER_LABELS, "field"),
)

TIME_TO_FIRST_TOKEN: Final = _histogram(
    "time_to_first_token_seconds", "Time to first token, in seconds.", _FIRST_TOKEN_BUCKETS
)
INTER_TOKEN_LATENCY: Final = _histogram(
    "inter_token_latency_seconds", "Time between two tokens of a request, in seconds.", _PER_TOKEN_BUCKETS
)
REQUEST_TIME_PER_OUTPUT_TOKEN: Final = _histogram(
    "request_time_per_output_token_seconds", "A request's mean time per output token, in seconds.", _PER_TOKEN_BUCKETS
)
E2E_REQUEST_LATENCY: Final = _histogram(
    "e2e_request_latency_seconds", "End-to-end request latency, in seconds.", _LATENCY_BUCKETS
)
REQUEST_QUEUE_TIME: Final = _histogram(
    "request_queue_time_seconds", "Time a request spent waiting, in seconds.", _LATENCY_BUCKETS
)
REQUEST_INFERENCE_TIME: Final = _histogram(
    "request_inference_time_seconds", "Time a request spent running, in seconds.", _LATENCY_BUCKETS
)
REQUEST_PREFILL_TIME: Final = _histogram(
    "request_prefill_time_seconds", "Time a request spent in prefill, in seconds.", _LATENCY_BUCKETS
)
REQUEST_DECODE_TIME: Final = _histogram(
    "request_decode_time_seconds", "Time a request spent in decode, in seconds.", _LATENCY_BUCKETS
)

REQUEST_PROMPT_TOKENS: Final = _token_histogram("request_prompt_tokens", "Prefill tokens of a request.")
REQUEST_GENERATION_TOKENS: Final = _token_histogram("request_generation_tokens", "Generation tokens of a request.")
REQUEST_MAX_NUM_GENERATION_TOKENS: Final = _token_histogram(
    "request_max_num_generation_tokens", "Most generation tokens of any sequence of a request."
)
REQUEST_PARAMS_MAX_TOKENS: Final = _token_histogram(
    "request_params_max_tokens", "The max_tokens parameter of a request."
)
REQUEST_PREFILL_KV_COMPUTED_TOKENS: Final = _token_histogram(
    "request_prefill_kv_computed_tokens", "Prompt tokens of a request that were computed, not found in the cache."
)
REQUEST_PARAMS_N: Final = _histogram("request_params_n", "The n parameter of a request.", (1.0, 2.0, 5.0, 10.0, 20.0))
ITERATION_TOKENS: Final = _histogram("iteration_tokens_total", "Tokens of an engine step.", _ITERATION_BUCKETS)

SERVER_METRICS: Final = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""Every metric above, in the order of this file."""

GATEWAY_REQUESTS: Final = "quire_gateway_requests_total"
GATEWAY_REQUEST_DURATION: Final = "quire_gateway_request_duration_seconds"
GATEWAY_REQUESTS_WAITING: Final = "quire_gateway_requests_waiting"
GATEWAY_REQUESTS_IN_FLIGHT: Final = "quire_gateway_requests_in_flight"
GATEWAY_DEMAND: Final = "quire_gateway_demand"
GATEWAY_BACKENDS_READY: Final = "quire_gateway_backends_ready"
