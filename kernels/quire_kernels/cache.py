"""The paged KV cache: rotary positions fused with the write of key and value, and copies of whole blocks.

A cache is [num_blocks, block_size, num_kv_heads, head_dim]; slot s is row s % block_size of block s // block_size; what
has slot -1 is written nowhere. The caller owns all tensors; query, key and the caches are written in place.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from quire_kernels._checks import argument_error, describe
from quire_kernels._cpu.native import INT64, POINTER, bind
from quire_kernels.device import Backend, backend_for
from quire_kernels.reference import copy_blocks_ref, rope_and_cache_ref, swap_blocks_ref

_DTYPE_TO_NATIVE = {
    torch.float32: bind("quire_rope_and_cache_f32", [POINTER], INT64),
    torch.bfloat16: bind("quire_rope_and_cache_bf16", [POINTER], INT64),
}
_pack_arguments = struct.Struct("26q").pack  # RopeArguments in rope.cpp


def rope_and_cache(
    query: Tensor,  # [num_tokens, num_heads, head_dim], rotated in place
    key: Tensor,  # [num_tokens, num_kv_heads, head_dim], rotated in place
    value: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    positions: Tensor | None,  # [num_tokens] int64
    cos_sin_cache: Tensor | None,  # [max_position, rotary_dim] float32
    key_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    slot_mapping: Tensor,  # [num_tokens] int64
    *,
    is_interleaved: bool = False,
) -> None:
    """Rotate query and key by their positions (Su et al. 2021) and write key and value to their slots.

    Row p of cos_sin_cache is cos(p * inv_freq) followed by sin(p * inv_freq); the first rotary_dim elements of a head
    are rotated, in pairs (i, i + rotary_dim / 2) or, interleaved, (2i, 2i + 1). Without a cos_sin_cache nothing is
    rotated. query, key and value may be views of one fused buffer, contiguous in head_dim.

    Raises:
        ValueError: a shape, dtype, device, stride, position or slot does not fit; the message names the argument.
    """
    _check_heads(query, key, value)
    _check_caches(key, key_cache, value_cache)
    if (
        slot_mapping.shape != query.shape[:1]
        or slot_mapping.dtype is not torch.int64
        or slot_mapping.device != query.device
        or not slot_mapping.is_contiguous()
    ):
        raise argument_error("slot_mapping", slot_mapping, f"contiguous int64[{query.shape[0]}] on {query.device}")
    positions = None if cos_sin_cache is None else _check_rotation(query, positions, cos_sin_cache)
    is_native = query.dtype is key_cache.dtype and backend_for(query) is Backend.NATIVE
    (_rope_and_cache_native if is_native else rope_and_cache_ref)(
        query,
        key,
        value,
        positions,
        cos_sin_cache,
        key_cache,
        value_cache,
        slot_mapping,
        is_interleaved=is_interleaved,
    )


def _rope_and_cache_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    is_interleaved: bool,
) -> None:
    max_position, rotary_dim = (0, 0) if cos_sin_cache is None else cos_sin_cache.shape
    arguments = _pack_arguments(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        0 if cos_sin_cache is None else cos_sin_cache.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        query.shape[0],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        rotary_dim,
        max_position,
        key_cache.shape[0],
        key_cache.shape[1],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        is_interleaved,
    )
    wrong = _DTYPE_TO_NATIVE[query.dtype].call(arguments)
    if wrong > 0 and positions is not None:
        raise argument_error(f"positions[{wrong - 1}]", int(positions[wrong - 1]), f"in [0, {max_position})")
    if wrong < 0:
        num_slots = key_cache.shape[0] * key_cache.shape[1]
        raise argument_error(f"slot_mapping[{-1 - wrong}]", int(slot_mapping[-1 - wrong]), f"below {num_slots}")


def copy_blocks(
    cache: Tensor,  # [num_blocks, ...]
    src_dst: Sequence[tuple[int, int]],
) -> None:
    """Copy whole blocks inside one cache, one pair after the other.

    Raises:
        ValueError: a block id is not one of the cache.
    """
    _check_pairs(src_dst, cache.shape[0], cache.shape[0])
    if cache.is_cpu:
        _move_blocks(cache, cache, src_dst)
    else:
        copy_blocks_ref(cache, src_dst)


def swap_blocks(
    src_cache: Tensor,  # [num_src_blocks, ...]
    dst_cache: Tensor,  # [num_dst_blocks, ...], blocks of the same shape
    src_dst: Sequence[tuple[int, int]],
) -> None:
    """Copy whole blocks from one cache to another, on the same device or between devices.

    Raises:
        ValueError: the caches' blocks differ, or a block id is not one of its cache.
    """
    if src_cache.shape[1:] != dst_cache.shape[1:] or src_cache.dtype is not dst_cache.dtype:
        raise argument_error("dst_cache", dst_cache, f"of blocks like src_cache's, {describe(src_cache)}")
    _check_pairs(src_dst, src_cache.shape[0], dst_cache.shape[0])
    if src_cache.is_cpu and dst_cache.is_cpu:
        _move_blocks(src_cache, dst_cache, src_dst)
    else:
        swap_blocks_ref(src_cache, dst_cache, src_dst)


def _move_blocks(src_cache: Tensor, dst_cache: Tensor, src_dst: Sequence[tuple[int, int]]) -> None:
    """Copy blocks between CPU tensors: by memmove where blocks are contiguous."""
    if src_dst and not (src_cache[0].is_contiguous() and dst_cache[0].is_contiguous()):
        swap_blocks_ref(src_cache, dst_cache, src_dst)
        return
    item_size = src_cache.element_size()
    size_bytes = src_cache.shape[1:].numel() * item_size
    src_base, src_stride = src_cache.data_ptr(), src_cache.stride(0) * item_size
    dst_base, dst_stride = dst_cache.data_ptr(), dst_cache.stride(0) * item_size
    for src, dst in src_dst:
        ctypes.memmove(dst_base + dst * dst_stride, src_base + src * src_stride, size_bytes)


def _check_pairs(src_dst: Sequence[tuple[int, int]], num_src: int, num_dst: int) -> None:
    for src, dst in src_dst:
        if not 0 <= src < num_src or not 0 <= dst < num_dst:
            raise argument_error("src_dst", (src, dst), f"of blocks in [0, {num_src}) and [0, {num_dst})")


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 3 or not query.is_floating_point() or query.stride(2) != 1:
        raise argument_error("query", query, "floating [num_tokens, num_heads, head_dim], contiguous in head_dim")
    shape = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if (
            tensor.dim() != 3
            or tensor.shape[0] != shape[0]
            or tensor.shape[2] != shape[2]
            or tensor.dtype is not query.dtype
            or tensor.device != query.device
            or tensor.stride(2) != 1
        ):
            expected = f"[{shape[0]}, num_kv_heads, {shape[2]}] of query's dtype and device, contiguous in head_dim"
            raise argument_error(name, tensor, expected)
    if value.shape != key.shape:
        raise argument_error("value", value, f"of key's shape {list(key.shape)}")


def _check_caches(key: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    if (
        key_cache.dim() != 4
        or key_cache.shape[2:] != key.shape[1:]
        or key_cache.device != key.device
        or key_cache.stride(3) != 1
    ):
        expected = f"[num_blocks, block_size, {key.shape[1]}, {key.shape[2]}] on {key.device}, contiguous in the last"
        raise argument_error("key_cache", key_cache, expected)
    if (
        value_cache.shape != key_cache.shape
        or value_cache.stride() != key_cache.stride()
        or value_cache.dtype is not key_cache.dtype
        or value_cache.device != key_cache.device
    ):
        raise argument_error("value_cache", value_cache, f"like key_cache, {describe(key_cache)}")


def _check_rotation(query: Tensor, positions: Tensor | None, cos_sin_cache: Tensor) -> Tensor:
    if (
        positions is None
        or positions.shape != query.shape[:1]
        or positions.dtype is not torch.int64
        or positions.device != query.device
        or not positions.is_contiguous()
    ):
        raise argument_error("positions", positions, f"contiguous int64[{query.shape[0]}] on {query.device}")
    if (
        cos_sin_cache.dim() != 2
        or cos_sin_cache.shape[1] % 2 != 0
        or cos_sin_cache.shape[1] > query.shape[2]
        or cos_sin_cache.dtype is not torch.float32
        or cos_sin_cache.device != query.device
        or not cos_sin_cache.is_contiguous()
    ):
        expected = f"contiguous float32[max_position, an even number up to {query.shape[2]}] on {query.device}"
        raise argument_error("cos_sin_cache", cos_sin_cache, expected)
    return positions
