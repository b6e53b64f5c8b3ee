"""The server's Prometheus metrics: vLLM's names (`quire_contract.metrics`), fed by engine steps and by requests' times.

Values live in plain Python objects, and become text only when `/metrics` is read: on the token path an observation is
one bisection and two additions. Used on the event loop's thread alone.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from quire_contract import metrics as names
from quire_contract.metrics import Metric, MetricKind, token_buckets
from quire_server.engine.border.messages import EngineReady, EngineStep
from quire_server.engine.output import SchedulerStats
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.frontend.output_processor import CompletionDelta
from quire_server.shared.config import EngineConfig
from quire_server.shared.sampling_params import SamplingParams

ENGINE = "0"
"""The `engine` label: there is one data-parallel rank."""
_DEFAULT_MAX_MODEL_LEN = 1 << 20  # the buckets' end until the engine has said how long a context may be


class Histogram:
    """Counts by bucket; buckets are upper bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = [float(bound) for bound in bounds]
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def render(self, name: str, labels: str) -> list[str]:
        """Return the lines of the exposition format."""
        lines, count = [], 0
        for bound, number in zip([*self.bounds, "+Inf"], self.counts, strict=True):
            count += number
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {count}.0')
        return [*lines, f"{name}_count{{{labels}}} {count}.0", f"{name}_sum{{{labels}}} {self.total}"]


class ServerMetrics:
    """Every metric of one server process."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._info: EngineReady | None = None
        self._stats = SchedulerStats()
        self._values: dict[str, float] = {}
        self._finished = dict.fromkeys(FinishReason, 0)
        self._ignored_fields = {names.OTHER_FIELD: 0}
        self.histograms = {
            metric.name: Histogram(token_buckets(_DEFAULT_MAX_MODEL_LEN) if metric.is_in_tokens else metric.buckets)
            for metric in names.SERVER_METRICS
            if metric.kind is MetricKind.HISTOGRAM
        }
        self._inter_token = self.histograms[names.INTER_TOKEN_LATENCY.name]
        self._labels = _format_labels({"model_name": config.model.served_model_names[0], "engine": ENGINE})
        self._process_registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process_registry)

    # ---- what is told ----

    def on_ready(self, info: EngineReady) -> None:
        """Learn the sizes of the loaded model."""
        self._info = info
        for metric in names.SERVER_METRICS:
            if metric.is_in_tokens:
                self.histograms[metric.name] = Histogram(token_buckets(info.max_model_len))

    def on_step(self, step: EngineStep) -> None:
        """Take the engine's gauges and counters."""
        if step.stats.num_steps > self._stats.num_steps and step.stats.step_num_tokens:
            self.histograms[names.ITERATION_TOKENS.name].observe(step.stats.step_num_tokens)
        self._stats = step.stats

    def start_request(self, request: EngineRequest) -> "RequestTimer":
        """Return what records the life of one request."""
        return RequestTimer(self, request)

    def count(self, metric: Metric, amount: float) -> None:
        self._values[metric.name] = self._values.get(metric.name, 0.0) + amount

    def count_ignored_field(self, field: str) -> None:
        """Count a field of a request that was ignored; the caller bounds the names."""
        self._ignored_fields[field] = self._ignored_fields.get(field, 0) + 1

    def observe(self, metric: Metric, value: float) -> None:
        self.histograms[metric.name].observe(value)

    def observe_inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def finish(self, reason: FinishReason) -> None:
        self._finished[reason] += 1

    @property
    def num_prompt_tokens(self) -> int:
        return int(self._values.get(names.PROMPT_TOKENS.name, 0.0))

    @property
    def num_generation_tokens(self) -> int:
        return int(self._values.get(names.GENERATION_TOKENS.name, 0.0))

    # ---- what is shown ----

    def render(self) -> bytes:
        """Return the exposition text of every metric (Prometheus text format 0.0.4).

        Written here, because endpoint pickers read it up to 20 times a second and prometheus_client's own writer
        takes milliseconds of the event loop for as many lines; it writes the process's own metrics.
        """
        lines: list[str] = []
        for metric in names.SERVER_METRICS:
            lines.append(f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind.value}")
            if metric.kind is MetricKind.HISTOGRAM:
                lines += self.histograms[metric.name].render(metric.name, self._labels)
            elif metric is names.CACHE_CONFIG_INFO:
                lines.append(f"{metric.name}{{{_format_labels(self._cache_config())}}} 1.0")
            else:
                extra_names = metric.labels[len(names.SERVER_LABELS) :]
                for extra_values, value in self._samples(metric):
                    extra = "".join(f',{name}="{text}"' for name, text in zip(extra_names, extra_values, strict=True))
                    lines.append(f"{metric.name}{{{self._labels}{extra}}} {float(value)}")
        return "\n".join([*lines, ""]).encode() + generate_latest(self._process_registry)

    def _samples(self, metric: Metric) -> list[tuple[list[str], float]]:
        """Return the extra labels and value of each series of a gauge or counter."""
        stats = self._stats
        prompt, cached = (self._values.get(m.name, 0.0) for m in (names.PROMPT_TOKENS, names.PROMPT_TOKENS_CACHED))
        by_metric: Mapping[str, list[tuple[list[str], float]]] = {
            names.NUM_REQUESTS_RUNNING.name: [([], stats.num_running)],
            names.NUM_REQUESTS_WAITING.name: [([], stats.num_waiting)],
            names.NUM_REQUESTS_WAITING_BY_REASON.name: [(["capacity"], stats.num_waiting)],
            names.KV_CACHE_USAGE_PERC.name: [([], stats.kv_cache_usage)],
            names.PREFIX_CACHE_QUERIES.name: [([], stats.prefix_cache_queries)],
            names.PREFIX_CACHE_HITS.name: [([], stats.prefix_cache_hits)],
            names.NUM_PREEMPTIONS.name: [([], stats.num_preemptions)],
            names.PROMPT_TOKENS_BY_SOURCE.name: [(["local_compute"], prompt - cached), (["local_cache_hit"], cached)],
            names.REQUEST_SUCCESS.name: [([reason.value], count) for reason, count in self._finished.items()],
            names.REQUEST_IGNORED_FIELDS.name: [([field], count) for field, count in self._ignored_fields.items()],
        }
        return by_metric.get(metric.name, [([], self._values.get(metric.name, 0.0))])

    def _cache_config(self) -> Mapping[str, object]:
        config, info = self._config.cache, self._info
        return {
            "block_size": info.block_size if info else config.block_size,
            "num_gpu_blocks": info.num_blocks if info else None,
            "num_cpu_blocks": 0,
            "cache_dtype": "auto",
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "kv_cache_memory_bytes": info.kv_cache_bytes if info else config.kv_cache_memory_bytes,
            "num_gpu_blocks_override": config.num_gpu_blocks_override,
            "enable_prefix_caching": config.enable_prefix_caching,
            "engine": ENGINE,
        }


def _format_labels(labels: Mapping[str, object]) -> str:
    """Return `name="value",…`, escaped as the exposition format asks."""
    pairs = []
    for name, value in labels.items():
        text = str(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        pairs.append(f'{name}="{text}"')
    return ",".join(pairs)


class RequestTimer:
    """Records one request's progress. All times are Unix times in seconds."""

    __slots__ = (
        "_first_token",
        "_has_prompt",
        "_is_closed",
        "_last_token",
        "_metrics",
        "_num_tokens",
        "_request",
        "_scheduled",
    )

    def __init__(self, metrics: ServerMetrics, request: EngineRequest) -> None:
        self._metrics = metrics
        self._request = request
        self._num_tokens = 0
        self._scheduled: float | None = None
        self._first_token: float | None = None
        self._has_prompt = False  # whether the prompt has been counted
        self._last_token = 0.0
        self._is_closed = False

    def observe(self, delta: CompletionDelta, scheduled_time: float | None, now: float) -> None:
        """Record what a delta says about the request's progress."""
        if scheduled_time is not None and self._scheduled is None:
            self._scheduled = scheduled_time
        if not self._has_prompt and (delta.token_ids or delta.finish_reason is FinishReason.LENGTH):
            self._record_prompt(delta)
        if delta.token_ids:
            if self._first_token is None:
                self._first_token = now
                self._metrics.observe(names.TIME_TO_FIRST_TOKEN, max(0.0, now - self._request.arrival_time))
            else:
                self._metrics.observe_inter_token(now - self._last_token)
            self._last_token = now
            self._num_tokens = delta.num_output_tokens
            self._metrics.count(names.GENERATION_TOKENS, len(delta.token_ids))
        if delta.finish_reason is not None:
            self._finish(delta.finish_reason, now)

    def close(self, now: float) -> None:
        """Record the end of a request that had no last delta: its client went away."""
        if not self._is_closed:
            self._finish(FinishReason.ABORT, now)

    def _record_prompt(self, delta: CompletionDelta) -> None:
        """Record a prompt that has been computed: its first token says so, or its end where it wanted none."""
        metrics, num_prompt_tokens = self._metrics, len(self._request.prompt_token_ids)
        self._has_prompt = True
        metrics.count(names.PROMPT_TOKENS, num_prompt_tokens)
        metrics.count(names.PROMPT_TOKENS_CACHED, delta.num_cached_tokens)
        metrics.observe(names.REQUEST_PREFILL_KV_COMPUTED_TOKENS, num_prompt_tokens - delta.num_cached_tokens)

    def _finish(self, reason: FinishReason, now: float) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        metrics, request = self._metrics, self._request
        metrics.finish(reason)
        metrics.observe(names.E2E_REQUEST_LATENCY, max(0.0, now - request.arrival_time))
        metrics.observe(names.REQUEST_PROMPT_TOKENS, len(request.prompt_token_ids))
        metrics.observe(names.REQUEST_GENERATION_TOKENS, self._num_tokens)
        metrics.observe(names.REQUEST_MAX_NUM_GENERATION_TOKENS, self._num_tokens)
        if isinstance(request.params, SamplingParams):
            metrics.observe(names.REQUEST_PARAMS_N, request.params.n)
            if request.params.max_tokens is not None:
                metrics.observe(names.REQUEST_PARAMS_MAX_TOKENS, request.params.max_tokens)
        if self._scheduled is None:
            return
        metrics.observe(names.REQUEST_QUEUE_TIME, max(0.0, self._scheduled - request.arrival_time))
        if self._first_token is None:
            return
        metrics.observe(names.REQUEST_PREFILL_TIME, max(0.0, self._first_token - self._scheduled))
        metrics.observe(names.REQUEST_INFERENCE_TIME, max(0.0, self._last_token - self._scheduled))
        metrics.observe(names.REQUEST_DECODE_TIME, self._last_token - self._first_token)
        if self._num_tokens > 1:
            time_per_token = (self._last_token - self._first_token) / (self._num_tokens - 1)
            metrics.observe(names.REQUEST_TIME_PER_OUTPUT_TOKEN, time_per_token)
