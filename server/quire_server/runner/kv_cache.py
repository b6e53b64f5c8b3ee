"""The KV cache's memory: allocated once, seen by each layer as its keys and values, moved by whole blocks.

Owns the memory of one pool, of the device or of the host; where a layer lies in a block is the contract's to say
(`quire_contract.memory.kv_cache`), which block belongs to whom the block pool's alone (engine). Invariants: a block is
one contiguous piece through all layers, so that one copy moves it; what the pool has not handed out and a step has not
written is never read, so blocks are not cleared between owners.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import torch
from torch import Tensor

from quire_contract.memory.kv_cache import KVCacheSpec, LayerPlace
from quire_kernels import copy_blocks, swap_blocks
from quire_server.engine.step import BlockCopy
from quire_server.models.attention import KVCache

_NAME_TO_DTYPE: Final = {
    **dict.fromkeys(("float32", "float"), torch.float32),
    **dict.fromkeys(("float16", "half"), torch.float16),
    "bfloat16": torch.bfloat16,
    **dict.fromkeys(("fp8", "fp8_e4m3"), torch.float8_e4m3fn),
    "fp8_e5m2": torch.float8_e5m2,
}


class KVCacheStorage:
    """One pool of blocks.

    Blocks in use lie together: memory is committed (on a CPU, in huge pages, zero) as blocks are first written, and not
    for each layer anew.

    Attributes:
        layers: [num_layers] of (key, value), each [num_blocks, block_size, num_kv_heads, dim], strided by block. A
            latent layer's value has no columns.

    Raises:
        FitError: the format's dtype is not known.
    """

    def __init__(self, spec: KVCacheSpec, *, num_blocks: int, block_size: int, device: torch.device) -> None:
        self._spec = spec
        self._blocks = _allocate((num_blocks, spec.bytes_per_block(block_size)), device)  # [num_blocks, num_bytes]
        self._block_size = block_size
        self._places = spec.places(block_size)
        self.layers = tuple(self._view_layer(place) for place in self._places)

    @property
    def num_bytes(self) -> int:
        return self._blocks.nbytes

    def scales(self, layer: int) -> Tensor:  # [num_blocks, num_bytes] uint8
        """Return what `layers[layer]` keeps behind the values: its key's scales, then its value's."""
        place = self._places[layer]
        return self._blocks[:, place.scales_offset : place.scales_offset + place.scales_bytes]

    def move(
        self,
        host: "KVCacheStorage | None",
        *,
        block_copies: Sequence[BlockCopy],
        swap_out: Sequence[BlockCopy],
        swap_in: Sequence[BlockCopy],
    ) -> None:
        """Execute a step's block movement in all layers, out before in, so that a freed block can be filled again.

        Raises:
            ValueError: there is no host pool to move to, its blocks are others, or a block is not there.
        """
        if swap_out or swap_in:
            if host is None:
                raise ValueError("a step moves blocks to or from host memory, and there is no host pool")
            swap_blocks(self._blocks, host._blocks, swap_out)
            swap_blocks(host._blocks, self._blocks, swap_in)
        copy_blocks(self._blocks, block_copies)

    def _view_layer(self, place: LayerPlace) -> KVCache:
        group = place.group
        key = self._view(place.key_offset, group.num_kv_heads, group.key_dim)
        return KVCache(key, self._view(place.value_offset, group.num_kv_heads, group.value_dim))

    def _view(self, offset: int, num_kv_heads: int, dim: int) -> Tensor:  # [num_blocks, block_size, num_kv_heads, dim]
        dtype = _NAME_TO_DTYPE[self._spec.format.dtype]
        elements, start = self._blocks.view(dtype), offset // dtype.itemsize
        part = elements[:, start : start + self._block_size * num_kv_heads * dim]
        return part.view(len(part), self._block_size, num_kv_heads, dim)


def _allocate(shape: tuple[int, int], device: torch.device) -> Tensor:  # [num_blocks, num_bytes] uint8
    if device.type != "cpu":
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    num_bytes = shape[0] * shape[1]
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes).view(shape)
