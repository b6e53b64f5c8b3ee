"""Attention of one layer, and the two things it is called with: where tokens sit, and where their keys and values live.

Owns: the projections, the order of rotation, cache write and attention. Does not know: which request a token belongs
to, how blocks are chosen, or how a linear layer is stored.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

import quire_kernels as kernels
from quire_server.models.linear import Linear
from quire_server.models.norm import Norm
from quire_server.models.spec import AttentionSpec


class KVCache(NamedTuple):
    """The cached keys and values of one layer. The runner owns the memory; a forward pass writes to it."""

    key: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Where the tokens of one step sit. Sequences follow one another; prefills and decodes mix freely."""

    query_start_loc: Tensor  # [num_seqs + 1] int32
    seq_lens: Tensor  # [num_seqs] int32, all tokens with keys and values after this step
    block_table: Tensor  # [num_seqs, max_blocks_per_seq] int32
    slot_mapping: Tensor  # [num_tokens] int64, block * block_size + offset; -1: not written
    max_seq_len: int | None = None
    """At least the largest of `seq_lens`, where the host knows it without asking the device."""


class StepContext(NamedTuple):
    """What every layer of one step shares."""

    positions: Tensor | None  # [num_tokens] int64; None: no rotation
    cos_sin_cache: Tensor | None  # [max_position, rotary_dim] float32
    metadata: AttentionMetadata


class QkNorm(NamedTuple):
    """Norms over each head of query and key, before rotation (Qwen 3)."""

    query: Norm
    key: Norm


def build_alibi_slopes(num_heads: int) -> list[float]:
    """Return how fast each head's scores fall with distance (Press et al., 2022)."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    # Heads beyond a power of two take every other slope of the next one.
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]


class Attention:
    """Self-attention over the paged cache."""

    __slots__ = (
        "_alibi_slopes",
        "_head_split",
        "_is_interleaved",
        "_num_qkv_heads",
        "_output",
        "_output_size",
        "_qk_norm",
        "_qkv",
        "_sliding_window",
        "_spec",
    )

    def __init__(
        self,
        spec: AttentionSpec,
        qkv: Linear,
        output: Linear,
        *,
        sliding_window: int | None,
        is_interleaved: bool,
        qk_norm: QkNorm | None = None,
        alibi_slopes: Tensor | None = None,  # [num_heads] float32
    ) -> None:
        self._spec = spec
        self._qkv = qkv
        self._output = output
        self._sliding_window = sliding_window
        self._is_interleaved = is_interleaved
        self._qk_norm = qk_norm
        self._alibi_slopes = alibi_slopes
        self._head_split = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        self._num_qkv_heads = sum(self._head_split)
        self._output_size = spec.num_heads * spec.head_dim

    def __call__(
        self,
        hidden: Tensor,  # [num_tokens, hidden_size]
        step: StepContext,
        kv_cache: KVCache,
    ) -> Tensor:  # [num_tokens, hidden_size]
        spec, metadata = self._spec, step.metadata
        key_cache, value_cache = kv_cache
        heads = self._qkv(hidden).view(-1, self._num_qkv_heads, spec.head_dim)
        query, key, value = heads.split_with_sizes(self._head_split, 1)
        if self._qk_norm is not None:
            query, key = self._qk_norm.query(query), self._qk_norm.key(key)
        kernels.rope_and_cache(
            query,
            key,
            value,
            step.positions,
            step.cos_sin_cache,
            key_cache,
            value_cache,
            metadata.slot_mapping,
            is_interleaved=self._is_interleaved,
        )
        attended = kernels.paged_attention(
            query,
            key_cache,
            value_cache,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            scale=spec.scale,
            sliding_window=self._sliding_window,
            soft_cap=spec.soft_cap,
            alibi_slopes=self._alibi_slopes,
        )
        return self._output(attended.view(-1, self._output_size))
