"""Attention over all heads' keys and values, as it runs. The kind is `kinds/attention.py`.

Owns: the projections, the order of rotation, cache write and attention. Does not know: which request a token belongs
to, how blocks are chosen, or how a linear layer is stored.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import quire_kernels as kernels
from quire_server.models.attention import KVCache, StepContext
from quire_server.models.kinds.attention import AttentionPlan
from quire_server.models.modules.linear import Linear
from quire_server.models.modules.norm import Norm
from quire_server.models.modules.part_builder import PartBuilder
from quire_server.models.planning.sharding import shard_units
from quire_server.shared.errors import UnsupportedModelError


class QkNorm(Protocol):
    """What is done to query and key before they are rotated."""

    def __call__(
        self,
        query: Tensor,  # [num_tokens, num_heads, head_dim]
        key: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    ) -> tuple[Tensor, Tensor]: ...


class HeadNorm:
    """A norm over each head (Qwen 3)."""

    __slots__ = ("_key", "_query")

    def __init__(self, query: Norm, key: Norm) -> None:
        self._query = query
        self._key = key

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self._query(query), self._key(key)


class ProjectionNorm(HeadNorm):
    """A norm over all heads of a token together (OLMo 2)."""

    __slots__ = ()

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self._query(query.flatten(1)).view(query.shape), self._key(key.flatten(1)).view(key.shape)


def build_alibi_slopes(num_heads: int) -> list[float]:
    """Return how fast each head's scores fall with distance (Press et al., 2022)."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    # Heads beyond a power of two take every other slope of the next one.
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What one worker's part of an attention is, apart from its projections."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    rope_index: int
    is_interleaved: bool


class Attention:
    """Self-attention over the paged cache."""

    __slots__ = (
        "_alibi_slopes",
        "_head_split",
        "_num_qkv_heads",
        "_output",
        "_output_size",
        "_qk_norm",
        "_qkv",
        "_shape",
    )

    def __init__(
        self,
        shape: AttentionShape,
        qkv: Linear,
        output: Linear,
        *,
        qk_norm: QkNorm | None = None,
        alibi_slopes: Tensor | None = None,  # [num_heads] float32
    ) -> None:
        self._shape = shape
        self._qkv = qkv
        self._output = output
        self._qk_norm = qk_norm
        self._alibi_slopes = alibi_slopes
        self._head_split = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self._num_qkv_heads = sum(self._head_split)
        self._output_size = shape.num_heads * shape.head_dim

    def __call__(
        self,
        hidden: Tensor,  # [num_tokens, hidden_size]
        step: StepContext,
        kv_cache: KVCache,
    ) -> Tensor:  # [num_tokens, hidden_size]
        shape, metadata = self._shape, step.metadata
        key_cache, value_cache = kv_cache
        heads = self._qkv(hidden).view(-1, self._num_qkv_heads, shape.head_dim)
        query, key, value = heads.split_with_sizes(self._head_split, 1)
        if self._qk_norm is not None:
            query, key = self._qk_norm(query, key)
        kernels.rope_and_cache(
            query,
            key,
            value,
            step.positions,
            step.cos_sin_caches[shape.rope_index],
            key_cache,
            value_cache,
            metadata.slot_mapping,
            is_interleaved=shape.is_interleaved,
        )
        attended = kernels.paged_attention(
            query,
            key_cache,
            value_cache,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            scale=shape.scale,
            sliding_window=shape.sliding_window,
            soft_cap=shape.soft_cap,
            alibi_slopes=self._alibi_slopes,
        )
        return self._output(attended.view(-1, self._output_size))


def build_attention(plan: AttentionPlan, builder: PartBuilder) -> Attention:
    """Build a rank's heads. Raises UnsupportedModelError for heads that do not divide."""
    spec, owner = plan.spec, plan.qkv.modules[0].name
    heads = shard_units(plan.query_heads, builder.share, owner)
    shape = AttentionShape(
        num_heads=len(heads),
        num_kv_heads=len(shard_units(plan.kv_heads, builder.share, owner)),
        head_dim=spec.head_dim,
        scale=spec.scale,
        sliding_window=spec.sliding_window,
        soft_cap=spec.soft_cap,
        rope_index=builder.rope_index(spec.rope),
        is_interleaved=spec.rope is not None and spec.rope.is_interleaved,
    )
    slopes = None
    if spec.is_alibi:
        own = build_alibi_slopes(spec.num_heads)[heads.start : heads.stop]
        slopes = torch.tensor(own, device=builder.reader.device)
    qk_norm = _build_qk_norm(plan, builder)
    return Attention(shape, builder.linear(plan.qkv), builder.linear(plan.output), qk_norm=qk_norm, alibi_slopes=slopes)


def _build_qk_norm(plan: AttentionPlan, builder: PartBuilder) -> QkNorm | None:
    if plan.query_norm is None or plan.key_norm is None:
        return None
    is_per_head = plan.spec.qk_norm_scope == "head"
    if not is_per_head and builder.share.world_size > 1:
        raise UnsupportedModelError(f"{plan.query_norm.module}: a norm over all heads cannot be divided among devices.")
    norm_class = HeadNorm if is_per_head else ProjectionNorm
    return norm_class(builder.norm(plan.query_norm), builder.norm(plan.key_norm))
