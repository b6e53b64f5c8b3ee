"""The KV tensors of all layers: allocated once, and moved by whole blocks.

Owns the memory; the block pool (engine) alone decides which block belongs to whom. Invariant: what the pool has not
handed out and a step has not written is never read, so blocks are not cleared between owners.
"""

import math
import mmap
from collections.abc import Sequence

import torch

from quire_kernels import copy_blocks, swap_blocks
from quire_server.engine.output import BlockCopy
from quire_server.models.attention import KVCache
from quire_server.models.spec import DecoderSpec


def allocate_kv_caches(
    spec: DecoderSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVCache]:
    """Allocate the keys and values of all layers, in one piece.

    A block is contiguous through all layers, so that what is in use lies together: memory is committed (on a CPU, in
    huge pages, zero) as blocks are first written, and not for each layer anew.

    Returns:
        [num_layers] of (key, value), each [num_blocks, block_size, num_kv_heads, head_dim], strided by block.
    """
    kept = spec.layers[0].attention.kv_shape
    shape = (num_blocks, spec.num_layers, 2, block_size, kept.num_kv_heads, kept.key_dim)
    memory = _allocate(shape, dtype, device)
    return [KVCache(memory[:, layer, 0], memory[:, layer, 1]) for layer in range(spec.num_layers)]


def move_blocks(
    kv_caches: Sequence[KVCache],
    host_caches: Sequence[KVCache] | None,
    *,
    block_copies: Sequence[BlockCopy],
    swap_out: Sequence[BlockCopy],
    swap_in: Sequence[BlockCopy],
) -> None:
    """Execute a step's block movement in every layer, out before in, so that a freed block can be filled again."""
    if (swap_out or swap_in) and host_caches is None:
        raise ValueError("a step moves blocks to or from host memory, and there is no host pool")
    for layer, cache in enumerate(kv_caches):
        for part, tensor in enumerate(cache):
            if host_caches is not None and swap_out:
                swap_blocks(tensor, host_caches[layer][part], swap_out)
            if host_caches is not None and swap_in:
                swap_blocks(host_caches[layer][part], tensor, swap_in)
            if block_copies:
                copy_blocks(tensor, block_copies)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_elements = math.prod(shape)
    memory = mmap.mmap(-1, num_elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=num_elements).view(shape)
