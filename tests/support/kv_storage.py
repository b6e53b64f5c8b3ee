"""KV storage for a decoder, without the arithmetic that gives a server's its size."""

import torch

from quire_contract.memory.kv_cache import KVCacheGroup, KVCacheSpec, KVFormat
from quire_server.models.planning.kv_cache_spec import build_kv_cache_groups
from quire_server.models.planning.spec import DecoderSpec
from quire_server.runner.kv_cache import KVCacheStorage


def small_kv_cache(window: int | None = None) -> KVCacheSpec:
    """Return what a model of one layer keeps: for an engine whose runner keeps its own."""
    kind = "full" if window is None else "window"
    group = KVCacheGroup(kind=kind, layers=(0,), num_kv_heads=1, key_dim=1, value_dim=1, window=window)
    return KVCacheSpec(groups=(group,), format=KVFormat(dtype="float32"))


def build_storage(
    spec: DecoderSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32
) -> KVCacheStorage:
    kv_format = KVFormat(dtype=str(dtype).removeprefix("torch."))
    kv_cache = KVCacheSpec(groups=build_kv_cache_groups(spec), format=kv_format)
    return KVCacheStorage(kv_cache, num_blocks=num_blocks, block_size=block_size, device=torch.device("cpu"))
