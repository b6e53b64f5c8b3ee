"""What the KV cache keeps of a model, and how a block of it is laid out: groups of layers, a format, and bytes.

Owns the rules that server and operator share: the size of a block, where each layer lies in it, which window lets
blocks go, and what one device of several holds. Knows no model, no tensors and no device; block tables are the
engine's.

Invariants: a block holds every layer, one after the other, key before value; scales stand behind the values of all
layers. Every layer is in one group.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final, Literal

from quire_contract.memory.dtypes import FitError, dtype_bytes

_SCALE_ALIGNMENT: Final = 4
"""Scales are float32 at most, and start where one may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheGroup:
    """Layers that keep the same thing of each token."""

    kind: Literal["full", "window", "latent"]
    """full: all tokens. window: those in the window. latent: one vector that keys and values are both made from
    (multi-head latent attention), which devices cannot divide."""
    layers: tuple[int, ...]
    """Their numbers in the model, ascending."""
    num_kv_heads: int
    key_dim: int
    value_dim: int
    """0: nothing besides the key (latent)."""
    window: int | None = None
    """Tokens that a layer looks back on, itself included."""

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise FitError(f"layers must be some, ascending, from 0 on; not {self.layers}")
        if (self.kind == "window") != (self.window is not None) or (self.window is not None and self.window < 1):
            raise FitError(f"a window of at least 1 is what kind 'window' has; not {self.kind!r} with {self.window}")
        if (self.kind == "latent") != (self.value_dim == 0) or min(self.num_kv_heads, self.key_dim) < 1:
            raise FitError(f"{self.kind!r} cannot keep {self.num_kv_heads} × ({self.key_dim} + {self.value_dim})")

    @property
    def num_tensors(self) -> int:
        """Key and value, or one latent."""
        return 1 if self.value_dim == 0 else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """How what is kept is stored. Scales are counted for one tensor (key or value) of one KV head."""

    dtype: str
    scale_bytes_per_token: int = 0
    scale_bytes_per_block: int = 0

    @property
    def element_bytes(self) -> int:
        """Raises FitError: the type is not known."""
        return dtype_bytes(self.dtype)

    def scale_bytes(self, block_size: int) -> int:
        return block_size * self.scale_bytes_per_token + self.scale_bytes_per_block


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlace:
    """Where one layer lies in a block: bytes from the block's begin."""

    layer: int
    group: KVCacheGroup
    key_offset: int
    value_offset: int
    scales_offset: int
    """Of its key's scales; its value's follow."""
    scales_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """The KV cache of a model, or of one device's part of it."""

    groups: tuple[KVCacheGroup, ...]
    format: KVFormat

    def __post_init__(self) -> None:
        layers = [layer for group in self.groups for layer in group.layers]
        if not layers or len(layers) != len(set(layers)):
            raise FitError("every layer must be in one group of the KV cache, and there must be one")

    @property
    def uniform_window(self) -> int | None:
        """The window that every layer has, behind which blocks are let go; None where any layer has another or none."""
        windows = {group.window for group in self.groups}
        return windows.pop() if len(windows) == 1 else None

    def bytes_per_block(self, block_size: int) -> int:
        """Return the bytes of one block of all layers, whatever their windows."""
        scales = sum(len(group.layers) * _scales_bytes(group, self.format, block_size) for group in self.groups)
        return self._values_bytes(block_size) + _round_up(scales)

    def places(self, block_size: int) -> tuple[LayerPlace, ...]:
        """Return where each layer lies in a block, by ascending layer."""
        key_offset, scales_offset = 0, self._values_bytes(block_size)
        places = []
        layer_to_group = {layer: group for group in self.groups for layer in group.layers}
        for layer, group in sorted(layer_to_group.items()):
            key_bytes, value_bytes = self._tensor_bytes(group, block_size)
            scales_bytes = _scales_bytes(group, self.format, block_size)
            places.append(
                LayerPlace(
                    layer=layer,
                    group=group,
                    key_offset=key_offset,
                    value_offset=key_offset + key_bytes,
                    scales_offset=scales_offset,
                    scales_bytes=scales_bytes,
                )
            )
            key_offset += key_bytes + value_bytes
            scales_offset += scales_bytes
        return tuple(places)

    def max_held_blocks(self, num_tokens: int, *, block_size: int, max_num_batched_tokens: int) -> int:
        """Return the most blocks that a sequence of so many tokens holds at once."""
        num_blocks = -(-num_tokens // block_size)
        if self.uniform_window is None:
            return num_blocks
        return min(num_blocks, max_blocks_in_window(self.uniform_window, block_size, max_num_batched_tokens))

    def share(self, *, tensor_parallel_size: int, layers: Collection[int]) -> "KVCacheSpec":
        """Return what one device holds of the given layers.

        Heads are dealt out; where they are fewer than devices, each device holds a copy of one.
        """
        shares = []
        for group in self.groups:
            kept = tuple(layer for layer in group.layers if layer in layers)
            is_divided = group.kind != "latent"
            num_kv_heads = -(-group.num_kv_heads // tensor_parallel_size) if is_divided else group.num_kv_heads
            if kept:
                shares.append(replace(group, layers=kept, num_kv_heads=num_kv_heads))
        return replace(self, groups=tuple(shares))

    def _values_bytes(self, block_size: int) -> int:
        return _round_up(sum(len(group.layers) * sum(self._tensor_bytes(group, block_size)) for group in self.groups))

    def _tensor_bytes(self, group: KVCacheGroup, block_size: int) -> tuple[int, int]:
        row_bytes = block_size * group.num_kv_heads * self.format.element_bytes
        return row_bytes * group.key_dim, row_bytes * group.value_dim


def max_blocks_in_window(window: int, block_size: int, max_num_batched_tokens: int) -> int:
    """Return the most blocks in which the tokens lie that a step of one sequence sees.

    They are the window's other tokens and the step's. The first may be the last of its block: the others then fill as
    many blocks as they can.
    """
    num_tokens = window - 1 + max_num_batched_tokens
    return 1 + -(-(num_tokens - 1) // block_size)


def _scales_bytes(group: KVCacheGroup, kv_format: KVFormat, block_size: int) -> int:
    return group.num_tensors * group.num_kv_heads * kv_format.scale_bytes(block_size)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _SCALE_ALIGNMENT) * _SCALE_ALIGNMENT
