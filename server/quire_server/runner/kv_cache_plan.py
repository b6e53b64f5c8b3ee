"""How many KV blocks fit: decided before anything is allocated, so that no profiling run is needed.

Owns the budget of a device's memory (weights + workspace + KV cache + what is left free), and the server's own rules
beside it: flags that fix the cache's size, and the context length that is served. The arithmetic is the contract's
(`quire_contract.memory.fit`), as the operator's is. Does not know where a number comes from (`host_limits`,
`torch.cuda`) nor allocates anything (`kv_cache`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire_contract.memory.fit import NUM_NULL_BLOCKS, DeviceMemory, FitRequest, device_memory, usable_bytes
from quire_contract.memory.kv_cache import KVCacheSpec
from quire_contract.memory.model_shape import ModelShape
from quire_server.shared.config import CacheConfig, EngineConfig
from quire_server.shared.errors import ConfigError, OutOfMemoryError

logger = logging.getLogger(__name__)

_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Where the device's memory goes, in bytes."""

    usable: int
    """Free before the weights were loaded, times gpu_memory_utilization."""
    weights: int
    workspace: int
    kv_cache: int

    @property
    def free(self) -> int:
        return self.usable - self.weights - self.workspace - self.kv_cache

    def as_table(self) -> str:
        """One line per share, in GiB, for the log."""
        rows = [(name, getattr(self, name)) for name in ("usable", "weights", "workspace", "kv_cache", "free")]
        return "\n".join(f"  {name:<10}{size_bytes / _GIB:9.3f} GiB" for name, size_bytes in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCachePlan:
    """What to allocate, and the context length it serves."""

    spec: KVCacheSpec
    """This device's."""
    whole: KVCacheSpec
    """The whole model's, by which blocks are held and let go: what no layer here needs, one of another stage may."""
    num_blocks: int
    """The null block included."""
    block_size: int
    max_model_len: int
    budget: MemoryBudget

    @property
    def num_tokens(self) -> int:
        """Tokens that can be cached at once."""
        return (self.num_blocks - NUM_NULL_BLOCKS) * self.block_size

    def resized(self, num_blocks: int, max_model_len: int) -> "KVCachePlan":
        budget = replace(self.budget, kv_cache=num_blocks * self.spec.bytes_per_block(self.block_size))
        return replace(self, num_blocks=num_blocks, max_model_len=max_model_len, budget=budget)


def plan_kv_cache(
    shape: ModelShape, config: EngineConfig, *, available_bytes: int, dtype: str, is_cpu: bool, stage: int = 0
) -> KVCachePlan:
    """Decide the number of blocks and the context length.

    Args:
        available_bytes: memory that was free before the weights were loaded.
        dtype: of weights, activations and KV cache.
        is_cpu: main memory is shared with others, so no more is taken than the sequences can ever need.
        stage: the pipeline stage whose device is planned.

    Raises:
        OutOfMemoryError: weights, or one sequence of the demanded max_model_len, do not fit.
        ConfigError: max_model_len is more than the model's positions.
    """
    cache, scheduler = config.cache, config.scheduler
    _check_model_len(shape, config.model.max_model_len)
    request = _fit_request(shape, config, available_bytes, dtype)
    device = device_memory(request, stage)
    usable = usable_bytes(available_bytes, cache.gpu_memory_utilization)
    num_blocks = _num_blocks(cache, device, usable)
    if num_blocks <= NUM_NULL_BLOCKS:
        raise _no_room(usable, device.need_bytes(1))
    max_model_len = _fit_model_len(request, device, num_blocks)
    if is_cpu and cache.kv_cache_memory_bytes is None and cache.num_gpu_blocks_override is None:
        num_blocks_needed = scheduler.max_num_seqs * -(-max_model_len // cache.block_size) + NUM_NULL_BLOCKS
        num_blocks = min(num_blocks, num_blocks_needed)
    return KVCachePlan(
        spec=device.kv_cache,
        whole=request.kv_cache,
        num_blocks=num_blocks,
        block_size=cache.block_size,
        max_model_len=max_model_len,
        budget=MemoryBudget(
            usable=usable,
            weights=device.weights_bytes,
            workspace=device.workspace_bytes,
            kv_cache=num_blocks * device.bytes_per_block,
        ),
    )


def agree_on_kv_cache(plans: Sequence[KVCachePlan]) -> tuple[KVCachePlan, ...]:
    """Return the plans of an engine's workers with the sizes that all of them can hold: block tables are common."""
    num_blocks = min(plan.num_blocks for plan in plans)
    max_model_len = min(plan.max_model_len for plan in plans)
    return tuple(plan.resized(num_blocks, max_model_len) for plan in plans)


def log_plan(plan: KVCachePlan) -> None:
    """Say where the memory goes, so that nobody has to guess."""
    logger.info(
        "KV cache: %d blocks of %d tokens = %d tokens, %.1f sequences of max_model_len=%d\n%s",
        plan.num_blocks - NUM_NULL_BLOCKS,
        plan.block_size,
        plan.num_tokens,
        plan.num_tokens / plan.max_model_len,
        plan.max_model_len,
        plan.budget.as_table(),
    )


def _fit_request(shape: ModelShape, config: EngineConfig, available_bytes: int, dtype: str) -> FitRequest:
    return FitRequest(
        shape=shape,
        memory_bytes=available_bytes,
        gpu_memory_utilization=config.cache.gpu_memory_utilization,
        dtype=dtype,
        max_model_len=config.model.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        block_size=config.cache.block_size,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        pipeline_parallel_size=config.parallel.pipeline_parallel_size,
    )


def _check_model_len(shape: ModelShape, max_model_len: int | None) -> None:
    if max_model_len is not None and max_model_len > shape.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the model's {shape.max_position_embeddings} positions.",
            hint=f"Set --max-model-len to at most {shape.max_position_embeddings}.",
        )


def _num_blocks(cache: CacheConfig, device: DeviceMemory, usable: int) -> int:
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes // device.bytes_per_block
    return device.num_blocks(usable)


def _fit_model_len(request: FitRequest, device: DeviceMemory, num_blocks: int) -> int:
    """The context length that one sequence alone can reach; a demanded one is never lowered in silence."""
    given, wanted = request.max_model_len, request.wanted_len
    num_tokens = (num_blocks - NUM_NULL_BLOCKS) * request.block_size
    if wanted <= num_tokens:
        return wanted
    if given is None:
        logger.warning("Lowered max_model_len from %d to %d, which is what the KV cache holds", wanted, num_tokens)
        return num_tokens
    need, have = device.kv_bytes(given), num_blocks * device.bytes_per_block
    raise OutOfMemoryError(
        f"A sequence of max_model_len={given} needs {need / _GIB:.2f} GiB of KV cache, and {have / _GIB:.2f} GiB fit.",
        need_bytes=need,
        have_bytes=have,
        hint=f"Set --max-model-len to at most {num_tokens}, or raise the memory limit or --gpu-memory-utilization.",
    )


def _no_room(usable: int, need: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"Weights, workspace and the smallest KV cache need {need / _GIB:.2f} GiB, and {usable / _GIB:.2f} GiB fit.",
        need_bytes=need,
        have_bytes=usable,
        hint="Raise the memory limit or --gpu-memory-utilization, or lower --max-num-batched-tokens.",
    )
