"""How many KV blocks fit: arithmetic, before anything is allocated, so that no profiling run is needed.

Owns the budget of a device's memory: weights + workspace + KV cache + what is left free. Does not know where a number
comes from (`host_limits`, `torch.cuda`) nor allocates anything (`kv_cache`). `quire_contract.fit` answers the same
questions from a config alone; a test compares the two.
"""

import logging
from dataclasses import dataclass

from quire_contract.fit import LOGITS_CHUNK_BYTES, NUM_NULL_BLOCKS
from quire_server.config import CacheConfig, EngineConfig
from quire_server.errors import ConfigError, OutOfMemoryError
from quire_server.models.spec import DecoderSpec

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

    num_blocks: int
    """The null block included."""
    block_size: int
    bytes_per_block: int
    """Keys and values, all layers."""
    max_model_len: int
    budget: MemoryBudget

    @property
    def num_tokens(self) -> int:
        """Tokens that can be cached at once."""
        return (self.num_blocks - NUM_NULL_BLOCKS) * self.block_size


def kv_bytes_per_token(spec: DecoderSpec, itemsize: int) -> int:
    """Bytes of keys and values of one token in all layers."""
    shapes = [layer.attention.kv_shape for layer in spec.layers]
    return sum(shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes) * itemsize


def logits_chunk_rows(vocab_size: int) -> int:
    """Rows of float32 logits that are made at a time where many are needed (prompt log-probabilities)."""
    return max(LOGITS_CHUNK_BYTES // (4 * vocab_size), 1)


def workspace_bytes(spec: DecoderSpec, *, max_num_batched_tokens: int, max_num_seqs: int, itemsize: int) -> int:
    """Most bytes that one step holds besides weights and KV: the widest moment of a layer, and the logits."""
    width = max(max(layer.attention.activation_width, layer.feed_forward.activation_width) for layer in spec.layers)
    per_token = (4 * spec.hidden_size + width) * itemsize
    logits_rows = max(max_num_seqs, min(max_num_batched_tokens, logits_chunk_rows(spec.vocab_size)))
    num_logits_copies = 3  # the logits, their processed copy, and a sort or a softmax of it
    return max_num_batched_tokens * per_token + logits_rows * spec.vocab_size * 4 * num_logits_copies


def plan_kv_cache(
    spec: DecoderSpec,
    config: EngineConfig,
    *,
    available_bytes: int,
    weights_bytes: int,
    itemsize: int,
    is_cpu: bool,
) -> KVCachePlan:
    """Decide the number of blocks and the context length.

    Args:
        available_bytes: memory that was free before the weights were loaded.
        itemsize: bytes of one element of the KV cache.
        is_cpu: main memory is shared with others, so no more is taken than the sequences can ever need.

    Raises:
        OutOfMemoryError: weights, or one sequence of the demanded max_model_len, do not fit.
        ConfigError: max_model_len is more than the model's positions.
    """
    block_size = config.cache.block_size
    bytes_per_block = block_size * kv_bytes_per_token(spec, itemsize)
    workspace = workspace_bytes(
        spec,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_num_seqs=config.scheduler.max_num_seqs,
        itemsize=itemsize,
    )
    usable = int(available_bytes * config.cache.gpu_memory_utilization)
    wanted_len = _wanted_model_len(spec, config.model.max_model_len)
    num_blocks = _num_blocks(config.cache, usable - weights_bytes - workspace, bytes_per_block)
    if num_blocks <= NUM_NULL_BLOCKS:
        raise _no_room(usable, weights_bytes + workspace + bytes_per_block * (1 + NUM_NULL_BLOCKS))
    max_model_len = _fit_model_len(config.model.max_model_len, wanted_len, num_blocks, bytes_per_block, block_size)
    if is_cpu and config.cache.kv_cache_memory_bytes is None and config.cache.num_gpu_blocks_override is None:
        num_blocks_needed = config.scheduler.max_num_seqs * -(-max_model_len // block_size) + NUM_NULL_BLOCKS
        num_blocks = min(num_blocks, num_blocks_needed)
    budget = MemoryBudget(
        usable=usable, weights=weights_bytes, workspace=workspace, kv_cache=num_blocks * bytes_per_block
    )
    return KVCachePlan(
        num_blocks=num_blocks,
        block_size=block_size,
        bytes_per_block=bytes_per_block,
        max_model_len=max_model_len,
        budget=budget,
    )


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


def _wanted_model_len(spec: DecoderSpec, max_model_len: int | None) -> int:
    if max_model_len is not None and max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the model's {spec.max_position_embeddings} positions.",
            hint=f"Set --max-model-len to at most {spec.max_position_embeddings}.",
        )
    return max_model_len or spec.max_position_embeddings


def _num_blocks(cache: CacheConfig, kv_bytes: int, bytes_per_block: int) -> int:
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    if cache.kv_cache_memory_bytes is not None:
        kv_bytes = cache.kv_cache_memory_bytes
    return max(kv_bytes // bytes_per_block, 0)


def _fit_model_len(given: int | None, wanted: int, num_blocks: int, bytes_per_block: int, block_size: int) -> int:
    """The context length that one sequence alone can reach; a demanded one is never lowered in silence."""
    num_tokens = (num_blocks - NUM_NULL_BLOCKS) * block_size
    if wanted <= num_tokens:
        return wanted
    if given is None:
        logger.warning("Lowered max_model_len from %d to %d, which is what the KV cache holds", wanted, num_tokens)
        return num_tokens
    need = (-(-given // block_size) + NUM_NULL_BLOCKS) * bytes_per_block
    have = num_blocks * bytes_per_block
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
