"""What a server is told at start: composed, frozen, validated where it is built.

Names are vLLM's flags. A value that cannot work raises `ConfigError` naming the flag.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quire_contract import ports
from quire_contract.flags.table import Dtype, SchedulingPolicy
from quire_contract.memory.fit import DEFAULT_BLOCK_SIZE, DEFAULT_GPU_MEMORY_UTILIZATION, DEFAULT_MAX_NUM_BATCHED_TOKENS
from quire_server.shared.errors import ConfigError


def _require(condition: bool, flag: str, rule: str) -> None:
    if not condition:
        raise ConfigError(f"--{flag} must be {rule}.", stage="Starting")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, from where, and in what precision."""

    model: str
    """As the person gave it: a directory, a .gguf file, or a model URI."""
    path: Path
    """Where the files are: a directory with config.json, or a .gguf file."""
    served_model_names: tuple[str, ...]
    tokenizer: Path | None = None
    """Directory of another tokenizer; None: the model's own."""
    dtype: Dtype = "auto"
    max_model_len: int | None = None
    """None: the model's own, lowered to what the KV cache holds."""
    seed: int = 0
    generation_config: Literal["auto", "vllm"] = "auto"
    chat_template: str | None = None
    """Jinja source that replaces the model's own."""

    def __post_init__(self) -> None:
        _require(bool(self.served_model_names), "served-model-name", "given at least once")
        _require(self.max_model_len is None or self.max_model_len > 0, "max-model-len", "greater than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """How much KV cache, in blocks of what size."""

    block_size: int = DEFAULT_BLOCK_SIZE
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION
    """Share of the device's memory (on a CPU: of the memory this process may use) for weights and KV together."""
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _require(
            self.block_size > 0 and self.block_size & (self.block_size - 1) == 0,
            "block-size",
            "a power of two",
        )
        _require(0.0 < self.gpu_memory_utilization <= 1.0, "gpu-memory-utilization", "in (0, 1]")
        _require(
            self.kv_cache_memory_bytes is None or self.kv_cache_memory_bytes > 0,
            "kv-cache-memory-bytes",
            "greater than 0",
        )
        _require(
            self.num_gpu_blocks_override is None or self.num_gpu_blocks_override > 1,
            "num-gpu-blocks-override",
            "greater than 1 (block 0 is reserved)",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How a step's work is chosen."""

    max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS
    max_num_seqs: int = 128
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    """Most tokens of one prompt in one step; 0: no limit but the budget."""
    policy: SchedulingPolicy = "fcfs"
    max_num_queued_reqs: int = 1024
    async_scheduling: bool | None = None
    """Schedule the next step before the result of the last is there. None: where the device works by itself."""

    def __post_init__(self) -> None:
        _require(self.max_num_seqs >= 1, "max-num-seqs", "at least 1")
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max-num-batched-tokens",
            "at least --max-num-seqs",
        )
        _require(self.long_prefill_token_threshold >= 0, "long-prefill-token-threshold", "at least 0")
        _require(self.max_num_queued_reqs >= 1, "max-num-queued-reqs", "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Over how many devices one engine is spread. A worker's rank says which part of it that worker is."""

    tensor_parallel_size: int = 1
    """Devices that share each layer."""
    pipeline_parallel_size: int = 1
    """Stages, each with a part of the layers."""

    def __post_init__(self) -> None:
        _require(self.tensor_parallel_size >= 1, "tensor-parallel-size", "at least 1")
        _require(self.pipeline_parallel_size >= 1, "pipeline-parallel-size", "at least 1")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def tensor_rank(self, rank: int) -> int:
        """Return a worker's place among those that share its layers, which have neighbouring ranks."""
        return rank % self.tensor_parallel_size

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of a worker."""
        return rank // self.tensor_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All that the engine process needs."""

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = None
    """CPU threads for the model; None: the CPU quota of this process."""
    log_format: Literal["plain", "json"] = "plain"
    log_level: str = "info"

    def __post_init__(self) -> None:
        _require(self.num_threads is None or self.num_threads >= 1, "num-threads", "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All that the API process needs."""

    engine: EngineConfig
    host: str = "0.0.0.0"
    port: int = ports.SERVER_HTTP
    fd: int | None = None
    """A listening socket that this process was started with, instead of `host` and `port`."""
    api_keys: tuple[str, ...] = ()
    shutdown_timeout_s: float = 120.0
    engine_heartbeat_timeout_s: float = 60.0
    """`/livez` fails when the engine loop has said nothing for so long, and has announced no longer silence."""
    allowed_origins: tuple[str, ...] = ("*",)
    max_request_body_bytes: int = 16 * 1024 * 1024
    """Decoding a body holds the interpreter's lock to its end, so this bounds how long no other request is served."""
    enable_request_id_headers: bool = False
    enable_force_include_usage: bool = False
    strict_fields: bool = False
    """Fields of a request that are not known are refused, not ignored."""
    response_role: str = "assistant"
    log_stats: bool = True
    log_requests: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "port", "in [0, 65535]")
        _require(self.fd is None or self.fd >= 0, "fd", "at least 0")
        _require(all(self.api_keys), "api-key", "not empty")
        _require(self.engine_heartbeat_timeout_s > 0, "engine-heartbeat-timeout", "greater than 0")
        _require(self.max_request_body_bytes > 0, "max-request-body-bytes", "greater than 0")
        _require(self.shutdown_timeout_s >= 0, "shutdown-timeout", "at least 0")
