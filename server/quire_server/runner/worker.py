"""One device's part of an engine: from a configuration and a rank to a model, its KV cache and its runner.

Owns what is on the device. Knows nothing of requests, of the scheduler, nor of other workers: an executor brings those
together. It first plans (`plan_worker`: nothing is read, nothing taken) and then starts (`start_worker`), so that
several can agree in between on how many blocks they have. Every stage of the start is timed and reported; what cannot
work raises a `StartupError` before memory is taken for it.
"""

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from quire_contract.memory.fit import stage_layers
from quire_contract.phases import Phase
from quire_server.engine.border.messages import EngineProgress
from quire_server.models.decoder import DecoderModel
from quire_server.models.footprint import shape_of_plan
from quire_server.models.free_memory import free_bytes
from quire_server.models.loader import load_plan, resolve_dtype
from quire_server.models.planning.plan import ModelPlan
from quire_server.models.planning.sharding import ModelShare
from quire_server.models.reader import CheckpointReader
from quire_server.models.registry import plan_model
from quire_server.runner.device import choose_device, use_device
from quire_server.runner.kv_cache import KVCacheStorage
from quire_server.runner.kv_cache_plan import KVCachePlan, log_plan, plan_kv_cache
from quire_server.runner.model_runner import ModelRunner, RunnerConfig
from quire_server.shared.config import EngineConfig
from quire_server.shared.host_limits import usable_cpu_count
from quire_server.weights.checkpoint import Checkpoint, lookup_in, open_checkpoint

OnProgress = Callable[[EngineProgress], None]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MAX_MMAP_THRESHOLD_BYTES = 32 << 20


class Stopwatch:
    """Seconds by stage of the start."""

    def __init__(self, earlier_seconds: Mapping[str, float]) -> None:
        self.seconds = dict(earlier_seconds)
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 4)
        self._last = now


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What a worker will hold. Nothing is read yet but headers, and nothing taken."""

    config: EngineConfig
    rank: int
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint
    model: ModelPlan
    kv_cache: KVCachePlan
    """The most that this device can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A device that is ready to run steps, and what there is to know of it."""

    device: torch.device
    model: DecoderModel
    plan: KVCachePlan
    runner: ModelRunner


def plan_worker(config: EngineConfig, rank: int) -> WorkerPlan:
    """Decide what a worker will hold.

    Args:
        rank: which of the engine's workers; it decides the device, the layers and the share of each layer.

    Raises:
        StartupError: the configuration, the checkpoint or the memory does not allow it.
    """
    device = choose_device(config, rank)
    checkpoint = open_checkpoint(config.model.path)
    dtype = resolve_dtype(config.model.dtype, checkpoint, device)
    model = plan_model(checkpoint.config, lookup_in(checkpoint))
    kv_cache = plan_kv_cache(
        shape_of_plan(model, checkpoint.default_dtype),
        config,
        available_bytes=free_bytes(device),
        dtype=str(dtype).removeprefix("torch."),
        is_cpu=device.type == "cpu",
        stage=config.parallel.stage(rank),
    )
    return WorkerPlan(
        config=config, rank=rank, device=device, dtype=dtype, checkpoint=checkpoint, model=model, kv_cache=kv_cache
    )


def start_worker(plan: WorkerPlan, kv_cache: KVCachePlan, *, on_progress: OnProgress, stopwatch: Stopwatch) -> Worker:
    """Bring one worker up: device, weights, KV cache, runner.

    Args:
        kv_cache: the plan's, with the sizes that all workers have agreed on (`agree_on_kv_cache`).
        on_progress: hears of loading, with percent.

    Raises:
        StartupError: the checkpoint or the memory does not allow it.
    """
    keep_freed_memory()
    use_device(plan.device)
    torch.set_num_threads(plan.config.num_threads or usable_cpu_count())
    log_plan(kv_cache)
    model = _load(plan, kv_cache.max_model_len, on_progress)
    stopwatch.lap("weights")
    runner = _build_runner(plan.config, model, kv_cache, plan.device)
    stopwatch.lap("kv_cache")
    return Worker(device=plan.device, model=model, plan=kv_cache, runner=runner)


def share_of(config: EngineConfig, rank: int, num_layers: int) -> ModelShare:
    """Return what of a model a worker holds."""
    parallel = config.parallel
    stages = stage_layers(num_layers, parallel.pipeline_parallel_size)
    return ModelShare(
        rank=parallel.tensor_rank(rank),
        world_size=parallel.tensor_parallel_size,
        layers=None if len(stages) == 1 else stages[parallel.stage(rank)],
    )


def keep_freed_memory() -> None:
    """Let the allocator keep what a step frees; by default every large tensor is mapped and faulted in anew."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _load(plan: WorkerPlan, max_model_len: int, on_progress: OnProgress) -> DecoderModel:
    def report(done: float) -> None:
        on_progress(EngineProgress(phase=Phase.LOADING, message="Loading the weights", percent=round(100 * done, 1)))

    report(0.0)
    return load_plan(
        plan.model,
        CheckpointReader(plan.checkpoint, plan.model.weights.aliases, plan.dtype, plan.device),
        on_progress=report,
        max_model_len=max_model_len,
        share=share_of(plan.config, plan.rank, plan.model.spec.num_layers),
    )


def _build_runner(config: EngineConfig, model: DecoderModel, plan: KVCachePlan, device: torch.device) -> ModelRunner:
    storage = KVCacheStorage(plan.spec, num_blocks=plan.num_blocks, block_size=plan.block_size, device=device)
    runner_config = RunnerConfig(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        seed=config.model.seed,
    )
    return ModelRunner(model, storage, runner_config, device=device)
