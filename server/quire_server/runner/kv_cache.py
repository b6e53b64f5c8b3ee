"""The KV tensors of all layers: allocated once, and moved by whole blocks.

Owns the memory; the block pool (engine) alone decides which block belongs to whom. Invariant: what the pool has not
handed out and a step has not written is never read, so blocks are not cleared between owners.
"""

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
    """Allocate one key and one value tensor per layer.

    Returns:
        [num_layers] of (key, value), each [num_blocks, block_size, num_kv_heads, head_dim]. On a CPU the memory is
        zero and is committed page by page as blocks are first written.
    """
    shape = (num_blocks, block_size, spec.attention.num_kv_heads, spec.attention.head_dim)
    return [KVCache(_allocate(shape, dtype, device), _allocate(shape, dtype, device)) for _ in range(spec.num_layers)]


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
    num_elements = 1
    for size in shape:
        num_elements *= size
    # A private mapping is zero, page-aligned and uncommitted; huge pages save the attention kernels TLB misses.
    memory = mmap.mmap(-1, num_elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=num_elements).view(shape)
