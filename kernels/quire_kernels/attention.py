"""Attention over a paged KV cache: one causal, varlen function for prefill, chunked prefill, decode and mixed batches.

Owns the argument checks and the choice between the native kernel and the reference. The native kernel reads keys and
values where they lie, checks every index it follows, and gives a sequence the same result whatever else is in the
batch.
"""

import struct

import torch
from torch import Tensor

from quire_kernels._checks import argument_error, describe
from quire_kernels._cpu.native import INT64, POINTER, bind
from quire_kernels.device import Backend, backend_for
from quire_kernels.reference import paged_attention_ref

_DTYPE_TO_NATIVE = {
    torch.float32: bind("quire_paged_attention_f32", [POINTER], INT64),
    torch.bfloat16: bind("quire_paged_attention_bf16", [POINTER], INT64),
}
_pack_arguments = struct.Struct("22q2d").pack  # AttentionArguments in attention.h
_BAD_QUERY_START_LOC, _BAD_SEQ_LENS, _BAD_BLOCK_TABLE = 1, 2, 3  # Status in attention.cpp


def paged_attention(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    key_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    block_table: Tensor,  # [num_seqs, max_blocks_per_seq] int32
    query_start_loc: Tensor,  # [num_seqs + 1] int32
    seq_lens: Tensor,  # [num_seqs] int32
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,  # [num_heads] float32
) -> Tensor:  # [num_tokens, num_heads, head_dim]
    """Attend causally to each sequence's own keys and values (PagedAttention, Kwon et al. 2023).

    The queries of sequence s are rows query_start_loc[s] to query_start_loc[s + 1] and the last of its seq_lens[s]
    positions, whose keys and values are in the cache already. `sliding_window` counts the query itself; blocks that lie
    wholly before every window are not read. The soft cap applies to scaled scores, before alibi. query may be a view
    (such as of a fused query-key-value buffer) whose last dimension is contiguous; so may the caches, with equal
    strides.

    Raises:
        ValueError: a shape, dtype, device, stride or index does not fit; the message names the argument.
    """
    _check_tensors(query, key_cache, value_cache, alibi_slopes)
    _check_metadata(query, block_table, query_start_loc, seq_lens)
    if not scale > 0.0:
        raise argument_error("scale", scale, "positive")
    if sliding_window is not None and sliding_window < 1:
        raise argument_error("sliding_window", sliding_window, "at least 1, or None")
    if soft_cap is not None and not soft_cap > 0.0:
        raise argument_error("soft_cap", soft_cap, "positive, or None")
    is_native = query.dtype is key_cache.dtype and backend_for(query) is Backend.NATIVE
    return (_paged_attention_native if is_native else paged_attention_ref)(
        query,
        key_cache,
        value_cache,
        block_table,
        query_start_loc,
        seq_lens,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
    )


def _paged_attention_native(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    out = torch.empty(query.shape, dtype=query.dtype)
    arguments = _pack_arguments(
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        out.data_ptr(),
        block_table.data_ptr(),
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        query.shape[0],
        seq_lens.shape[0],
        query.shape[1],
        key_cache.shape[2],
        query.shape[2],
        key_cache.shape[0],
        key_cache.shape[1],
        block_table.shape[1],
        *query.stride()[:2],
        *key_cache.stride()[:3],
        sliding_window or 0,
        scale,
        soft_cap or 0.0,
    )
    status = _DTYPE_TO_NATIVE[query.dtype].call(arguments)
    if status == _BAD_QUERY_START_LOC:
        expected = f"ascending from 0 to {query.shape[0]} tokens"
        raise argument_error("query_start_loc", query_start_loc.tolist(), expected)
    if status == _BAD_SEQ_LENS:
        expected = "at least the query length and at most what the block table has room for"
        raise argument_error("seq_lens", seq_lens.tolist(), expected)
    if status == _BAD_BLOCK_TABLE:
        expected = f"of block ids in [0, {key_cache.shape[0]}) wherever a query looks"
        raise argument_error("block_table", block_table, expected)
    return out


def _check_tensors(query: Tensor, key_cache: Tensor, value_cache: Tensor, alibi_slopes: Tensor | None) -> None:
    if query.dim() != 3 or not query.is_floating_point() or query.stride(2) != 1:
        raise argument_error("query", query, "floating [num_tokens, num_heads, head_dim], contiguous in head_dim")
    shape = query.shape
    if (
        key_cache.dim() != 4
        or key_cache.shape[3] != shape[2]
        or shape[1] % key_cache.shape[2] != 0
        or key_cache.stride(3) != 1
        or key_cache.device != query.device
    ):
        expected = f"[num_blocks, block_size, a divisor of {shape[1]} heads, {shape[2]}] on {query.device}"
        raise argument_error("key_cache", key_cache, f"{expected}, contiguous in the last")
    if (
        value_cache.shape != key_cache.shape
        or value_cache.stride() != key_cache.stride()
        or value_cache.dtype is not key_cache.dtype
        or value_cache.device != query.device
    ):
        raise argument_error("value_cache", value_cache, f"like key_cache, {describe(key_cache)}")
    if alibi_slopes is not None and (
        alibi_slopes.shape != shape[1:2]
        or alibi_slopes.dtype is not torch.float32
        or alibi_slopes.device != query.device
        or alibi_slopes.stride(0) != 1
    ):
        raise argument_error("alibi_slopes", alibi_slopes, f"contiguous float32[{shape[1]}] on {query.device}")


def _check_metadata(query: Tensor, block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor) -> None:
    device = query.device
    if (
        seq_lens.dim() != 1
        or seq_lens.dtype is not torch.int32
        or seq_lens.device != device
        or not seq_lens.is_contiguous()
    ):
        raise argument_error("seq_lens", seq_lens, f"contiguous int32[num_seqs] on {device}")
    num_seqs = seq_lens.shape[0]
    if (
        block_table.dim() != 2
        or block_table.shape[0] != num_seqs
        or block_table.dtype is not torch.int32
        or block_table.device != device
        or not block_table.is_contiguous()
    ):
        raise argument_error(
            "block_table", block_table, f"contiguous int32[{num_seqs}, max_blocks_per_seq] on {device}"
        )
    if (
        query_start_loc.dim() != 1
        or query_start_loc.shape[0] != num_seqs + 1
        or query_start_loc.dtype is not torch.int32
        or query_start_loc.device != device
        or not query_start_loc.is_contiguous()
    ):
        raise argument_error("query_start_loc", query_start_loc, f"contiguous int32[{num_seqs + 1}] on {device}")
