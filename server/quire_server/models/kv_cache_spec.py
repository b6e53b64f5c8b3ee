"""From a decoder's spec to what its KV cache keeps: layers that keep the same are one group. Pure, without torch."""

from quire_contract.kv_cache import KVCacheGroup
from quire_server.models.spec import DecoderSpec


def build_kv_cache_groups(spec: DecoderSpec) -> tuple[KVCacheGroup, ...]:
    """Return the groups, in the order of their first layers."""
    attention = spec.attention
    shape = (attention.num_kv_heads, attention.head_dim, attention.head_dim)
    shape_to_layers: dict[tuple[int, int, int, int | None], list[int]] = {}
    for layer, window in enumerate(spec.sliding_windows):
        shape_to_layers.setdefault((*shape, window), []).append(layer)
    return tuple(
        KVCacheGroup(
            kind="latent" if value_dim == 0 else "full" if window is None else "window",
            layers=tuple(layers),
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            window=window,
        )
        for (num_kv_heads, key_dim, value_dim, window), layers in shape_to_layers.items()
    )
