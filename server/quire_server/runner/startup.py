"""From a configuration to an engine that can step: device, weights, KV cache, runner, warm-up.

Shared by the engine process and by `LLM`. Every stage is timed and reported; what cannot work raises a `StartupError`
before memory is taken for it.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from quire_contract.fit import NUM_NULL_BLOCKS
from quire_contract.phases import Phase
from quire_kernels import backend_summary
from quire_server.config import EngineConfig
from quire_server.engine.core import EngineCore, EngineCoreConfig
from quire_server.engine.messages import EngineProgress, EngineReady
from quire_server.engine.output import NewRequestData, RunningRequestData, SchedulerOutput
from quire_server.errors import ConfigError
from quire_server.host_limits import usable_cpu_count
from quire_server.models.decoder import DecoderModel
from quire_server.models.footprint import shape_of_checkpoint
from quire_server.models.loader import load_model, resolve_dtype
from quire_server.models.memory import free_bytes
from quire_server.runner.kv_cache import KVCacheStorage
from quire_server.runner.memory import KVCachePlan, log_plan, plan_kv_cache
from quire_server.runner.model_runner import ModelRunner, RunnerConfig
from quire_server.sampling_params import SamplingParams
from quire_server.weights.checkpoint import Checkpoint, open_checkpoint

logger = logging.getLogger(__name__)

OnProgress = Callable[[EngineProgress], None]

_NUM_WARM_UP_TOKENS = 8
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MAX_MMAP_THRESHOLD_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedEngine:
    """An engine that is ready to step, and what there is to know of it."""

    core: EngineCore
    info: EngineReady


class Stopwatch:
    """Seconds by stage of the start."""

    def __init__(self, earlier_seconds: Mapping[str, float]) -> None:
        self.seconds = dict(earlier_seconds)
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 4)
        self._last = now


def start_engine(
    config: EngineConfig, *, on_progress: OnProgress, earlier_seconds: Mapping[str, float] | None = None
) -> StartedEngine:
    """Bring an engine up.

    Args:
        on_progress: hears of loading (with percent) and of the warm-up.
        earlier_seconds: stages of the start that were over before, such as the imports.

    Raises:
        StartupError: the configuration, the checkpoint or the memory does not allow it.
    """
    stopwatch = Stopwatch(earlier_seconds or {})
    keep_freed_memory()
    device = _choose_device(config)
    torch.set_num_threads(config.num_threads or usable_cpu_count())
    checkpoint = open_checkpoint(config.model.path)
    dtype = resolve_dtype(config.model.dtype, checkpoint, device)
    plan = _plan(config, checkpoint, dtype, device)
    log_plan(plan)
    model = _load(checkpoint, plan, dtype, device, on_progress)
    stopwatch.lap("weights")
    runner = _build_runner(config, model, plan, device)
    core = EngineCore(_build_core_config(config, plan), runner)
    stopwatch.lap("kv_cache")
    on_progress(EngineProgress(phase=Phase.WARMING_UP))
    warm_up(runner, plan)
    stopwatch.lap("warm_up")
    info = _build_info(plan, model, device, stopwatch.seconds)
    logger.info("Engine is ready: device=%s dtype=%s seconds=%s", info.device, info.dtype, info.load_seconds)
    return StartedEngine(core=core, info=info)


def keep_freed_memory() -> None:
    """Let the allocator keep what a step frees; by default every large tensor is mapped and faulted in anew."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def warm_up(runner: ModelRunner, plan: KVCachePlan) -> None:
    """Run one small prefill and one decode, so that the first request does not pay for what is built on first use.

    Writes to block 1, which nobody holds yet and nobody reads before it is written again.
    """
    num_tokens = min(_NUM_WARM_UP_TOKENS, plan.max_model_len - 1)
    if num_tokens == 0:
        return
    block_ids = [1] * (num_tokens // plan.block_size + 1)
    request = NewRequestData(
        request_id="warm-up",
        token_ids=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling_params=SamplingParams(seed=0),
        eos_token_ids=(),
        block_ids=block_ids,
        num_computed_tokens=0,
    )
    running = RunningRequestData(request_id="warm-up", new_block_ids=(), num_computed_tokens=num_tokens)
    runner.execute(
        SchedulerOutput(
            new_requests=[request], num_scheduled_tokens={"warm-up": num_tokens}, total_num_scheduled_tokens=num_tokens
        )
    )
    runner.execute(
        SchedulerOutput(running_requests=[running], num_scheduled_tokens={"warm-up": 1}, total_num_scheduled_tokens=1)
    )
    runner.execute(SchedulerOutput(removed_request_ids=["warm-up"]))


def _choose_device(config: EngineConfig) -> torch.device:
    has_cuda = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda was asked for, and torch sees no CUDA device.", stage="Starting")
    return torch.device("cuda", 0) if has_cuda else torch.device("cpu")


def _plan(config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> KVCachePlan:
    return plan_kv_cache(
        shape_of_checkpoint(checkpoint),
        config,
        available_bytes=free_bytes(device),
        dtype=str(dtype).removeprefix("torch."),
        is_cpu=device.type == "cpu",
    )


def _load(
    checkpoint: Checkpoint, plan: KVCachePlan, dtype: torch.dtype, device: torch.device, on_progress: OnProgress
) -> DecoderModel:
    def report(share: float) -> None:
        on_progress(EngineProgress(phase=Phase.LOADING, message="Loading the weights", percent=round(100 * share, 1)))

    report(0.0)
    return load_model(checkpoint, dtype=dtype, device=device, on_progress=report, max_model_len=plan.max_model_len)


def _build_runner(config: EngineConfig, model: DecoderModel, plan: KVCachePlan, device: torch.device) -> ModelRunner:
    storage = KVCacheStorage(plan.spec, num_blocks=plan.num_blocks, block_size=plan.block_size, device=device)
    runner_config = RunnerConfig(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        seed=config.model.seed,
    )
    return ModelRunner(model, storage, runner_config, device=device)


def _build_core_config(config: EngineConfig, plan: KVCachePlan) -> EngineCoreConfig:
    return EngineCoreConfig(
        scheduler=config.scheduler,
        max_model_len=plan.max_model_len,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        sliding_window=plan.sliding_window,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )


def _build_info(plan: KVCachePlan, model: DecoderModel, device: torch.device, seconds: dict[str, float]) -> EngineReady:
    return EngineReady(
        max_model_len=plan.max_model_len,
        vocab_size=model.spec.vocab_size,
        num_blocks=plan.num_blocks - NUM_NULL_BLOCKS,
        block_size=plan.block_size,
        dtype=str(model.dtype).removeprefix("torch."),
        device=backend_summary(device),
        weights_bytes=model.num_parameter_bytes,
        kv_cache_bytes=plan.budget.kv_cache,
        load_seconds=seconds,
    )
