"""KV tensors, and the movement of blocks between them."""

import resource
from pathlib import Path

import pytest
import torch

from quire_server.engine.output import BlockCopy
from quire_server.models.attention import KVCache
from quire_server.models.kinds.attention import AttentionSpec
from quire_server.models.kinds.mlp import MlpSpec
from quire_server.models.parts import NormSpec
from quire_server.models.spec import DecoderSpec, LayerNorms, LayerSpec
from quire_server.runner.kv_cache import allocate_kv_caches, move_blocks

NORM = NormSpec(kind="rms", eps=1e-5)
LAYER = LayerSpec(
    attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=4, scale=1.0),
    feed_forward=MlpSpec(intermediate_size=16, activation="silu", is_gated=True),
    norms=LayerNorms.alike("pre", NORM),
)
SPEC = DecoderSpec(
    architecture="LlamaForCausalLM",
    layers=(LAYER,) * 2,
    hidden_size=16,
    vocab_size=10,
    max_position_embeddings=64,
    final_norm=NORM,
    embedding_size=16,
)


def allocate(num_blocks: int, dtype: torch.dtype = torch.float32) -> list[KVCache]:
    return allocate_kv_caches(SPEC, num_blocks=num_blocks, block_size=8, dtype=dtype, device=torch.device("cpu"))


def fill(caches: list[KVCache]) -> None:
    """Give every block of every tensor a value of its own."""
    for layer, cache in enumerate(caches):
        for part, tensor in enumerate(cache):
            tensor.copy_((torch.arange(len(tensor)) + 100 * layer + 1000 * part).view(-1, 1, 1, 1).expand_as(tensor))


def blocks_of(caches: list[KVCache]) -> list[list[float]]:
    """[layer and part][block]"""
    return [tensor[:, 0, 0, 0].tolist() for cache in caches for tensor in cache]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_allocation(dtype: torch.dtype) -> None:
    caches = allocate(5, dtype)
    assert len(caches) == 2
    for tensor in (tensor for cache in caches for tensor in cache):
        assert tensor.shape == (5, 8, 2, 4)
        assert tensor.dtype == dtype
        assert tensor[0].is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
    caches[0].key.fill_(1.0)
    assert not caches[0].value.any()
    assert not caches[1].key.any()


def test_memory_is_committed_as_it_is_written() -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident_pages()
    caches = allocate(1 << 20)  # 1 GiB
    caches[1].value[1234567 // 2].fill_(1.0)
    assert caches[1].value[1234567 // 2].sum() == 8 * 8
    assert (resident_pages() - before) * resource.getpagesize() < 32 << 20


def test_block_copies_happen_in_every_layer() -> None:
    caches = allocate(4)
    fill(caches)
    move_blocks(caches, None, block_copies=[BlockCopy(1, 3), BlockCopy(1, 2)], swap_out=(), swap_in=())
    assert blocks_of(caches) == [[base + each for each in (0, 1, 1, 1)] for base in (0, 1000, 100, 1100)]


def test_a_block_that_is_swapped_out_can_be_filled_again_in_the_same_step() -> None:
    device, host = allocate(3), allocate(2)
    fill(device)
    for cache in host:
        for tensor in cache:
            tensor[0] = -1.0
    move_blocks(device, host, block_copies=(), swap_out=[BlockCopy(2, 1)], swap_in=[BlockCopy(0, 2)])
    assert [each[1] for each in blocks_of(host)] == [2, 1002, 102, 1102]
    assert [each[2] for each in blocks_of(device)] == [-1] * 4


def test_swapping_needs_a_host_pool() -> None:
    with pytest.raises(ValueError, match="no host pool"):
        move_blocks(allocate(2), None, block_copies=(), swap_out=[BlockCopy(1, 1)], swap_in=())
