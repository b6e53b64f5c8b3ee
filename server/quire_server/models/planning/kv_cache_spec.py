"""From a decoder's spec to what its KV cache keeps: layers that keep the same are one group. Pure, without torch."""

from typing import Literal

from quire_contract.memory.kv_cache import KVCacheGroup
from quire_server.models.planning.spec import DecoderSpec, KVShape


def build_kv_cache_groups(spec: DecoderSpec) -> tuple[KVCacheGroup, ...]:
    """Return the groups, in the order of their first layers."""
    shape_to_layers: dict[KVShape, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        shape_to_layers.setdefault(layer.attention.kv_shape, []).append(index)
    return tuple(
        KVCacheGroup(
            kind=_kind(shape),
            layers=tuple(layers),
            num_kv_heads=shape.num_kv_heads,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            window=shape.sliding_window,
        )
        for shape, layers in shape_to_layers.items()
    )


def _kind(shape: KVShape) -> Literal["full", "window", "latent"]:
    if shape.value_dim == 0:
        return "latent"
    return "full" if shape.sliding_window is None else "window"
