"""Rotation, cache writes and block copies on every instruction set against their references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quire_kernels import copy_blocks, rope_and_cache, swap_blocks
from quire_kernels.reference import rope_and_cache_ref
from quire_kernels.testing import assert_close, build_cos_sin_cache, build_poisoned_caches, replace_arguments

DTYPES = [torch.float32, torch.bfloat16]


def build_fused(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Return query, key and value as views of one random fused buffer."""
    fused = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    return list(fused.split([num_heads, num_kv_heads, num_kv_heads], dim=1))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bit patterns, so that NaN equals NaN."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (128, 128), (96, 24), (6, 2), (48, 48)])
@pytest.mark.parametrize("num_tokens", [1, 5, 90])
def test_rope_and_cache(
    isa: str, num_tokens: int, head_dim: int, rotary_dim: int, is_interleaved: bool, dtype: torch.dtype
) -> None:
    query, key, value = build_fused(num_tokens, 6, 2, head_dim, dtype)
    wide = [x.float().clone() for x in (query, key, value)]
    value_before = value.clone()
    cos_sin_cache = build_cos_sin_cache(200, rotary_dim)
    positions, slots = torch.randint(0, 200, (num_tokens,)), torch.randperm(16 * 8)[:num_tokens]
    slots[num_tokens // 2] = -1
    caches = build_poisoned_caches(16, 8, 2, head_dim, dtype)
    expected = build_poisoned_caches(16, 8, 2, head_dim, torch.float32)
    rope_and_cache(query, key, value, positions, cos_sin_cache, *caches, slots, is_interleaved=is_interleaved)
    rope_and_cache_ref(*wide, positions, cos_sin_cache, *expected, slots, is_interleaved=is_interleaved)
    for actual, reference in zip((query, key), wide, strict=False):
        assert_close(actual, reference)
    assert torch.equal(value, value_before)
    for cache, tokens, reference in zip(caches, (key, value), expected, strict=True):
        is_written = ~reference.isnan().all(-1)
        assert same_bits(is_written.float(), (~cache.isnan()).all(-1).float())
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(cache[slot // 8, slot % 8], tokens[token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_rotation_only_the_cache_is_written(isa: str, dtype: torch.dtype) -> None:
    tensors = build_fused(4, 2, 1, 16, dtype)
    before = [x.clone() for x in tensors]
    key_cache, value_cache = build_poisoned_caches(3, 4, 1, 16, dtype)
    rope_and_cache(*tensors, None, None, key_cache, value_cache, torch.tensor([11, 0, 5, 4]))
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert torch.equal(key_cache[[2, 0, 1, 1], [3, 0, 1, 0]], before[1])
    assert torch.equal(value_cache[[2, 0, 1, 1], [3, 0, 1, 0]], before[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_slots_leave_the_cache_bit_identical(isa: str, dtype: torch.dtype) -> None:
    query, key, value = build_fused(4, 2, 1, 16, dtype)
    caches = build_poisoned_caches(3, 4, 1, 16, dtype)
    before = [cache.clone() for cache in caches]
    rope_and_cache(query, key, value, torch.arange(4), build_cos_sin_cache(8, 16), *caches, torch.full((4,), -1))
    assert all(same_bits(cache, old) for cache, old in zip(caches, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_32_bits(isa: str, dtype: torch.dtype) -> None:
    """The caches are more than 2^31 elements, of which only the last slots are ever touched."""
    shape = (2**31 // (16 * 2 * 64) + 2, 16, 2, 64)
    key_cache, value_cache = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    query, key, value = build_fused(3, 2, 2, 64, dtype)
    num_slots = shape[0] * shape[1]
    slots = torch.tensor([num_slots - 1, num_slots - 17, num_slots - 2])
    rope_and_cache(query, key, value, None, None, key_cache, value_cache, slots)
    assert torch.equal(key_cache.view(-1, 2, 64)[slots], key)
    assert torch.equal(value_cache.view(-1, 2, 64)[slots], value)


def test_float16_runs_on_torch(isa: str) -> None:
    query, key, value = build_fused(3, 2, 2, 8, torch.float16)
    caches = build_poisoned_caches(2, 4, 2, 8, torch.float16)
    rope_and_cache(query, key, value, torch.arange(3), build_cos_sin_cache(8, 8), *caches, torch.arange(3))
    assert torch.equal(caches[0][0, :3], key)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_copy_and_swap_blocks(dtype: torch.dtype) -> None:
    cache = (torch.rand(6, 4, 2, 8) * 100).to(dtype)
    other = torch.zeros(5, 4, 2, 8, dtype=dtype)
    expected = cache.clone()
    copy_blocks(cache, [(0, 3), (3, 5)])  # in order: block 0 reaches 5 through 3
    expected[3] = expected[0]
    expected[5] = expected[0]
    assert torch.equal(cache, expected)
    swap_blocks(cache, other, [(1, 4), (5, 0)])
    assert torch.equal(other[[4, 0]], cache[[1, 5]])
    assert other[1:4].count_nonzero() == 0
    copy_blocks(cache, [])
    assert torch.equal(cache, expected)


def test_blocks_of_strided_caches() -> None:
    both = torch.randn(4, 2, 3, 8)  # [num_blocks, key or value, ...]: blocks contiguous, not adjacent
    expected = both.clone()
    copy_blocks(both[:, 1], [(0, 2)])
    expected[2, 1] = expected[0, 1]
    assert torch.equal(both, expected)
    scattered, target = torch.randn(8, 3, 4).permute(2, 1, 0), torch.zeros(4, 3, 8)
    swap_blocks(scattered, target, [(3, 1)])
    assert torch.equal(target[1], scattered[3])


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: copy_blocks(cache, [(0, 6)]),
        lambda cache: copy_blocks(cache, [(-1, 0)]),
        lambda cache: swap_blocks(cache, torch.zeros(2, 4), [(0, 2)]),
        lambda cache: swap_blocks(cache, torch.zeros(6, 5), [(0, 1)]),
        lambda cache: swap_blocks(cache, torch.zeros(6, 4, dtype=torch.bfloat16), [(0, 1)]),
    ],
)
def test_wrong_blocks_are_refused(call: Callable[[Tensor], None]) -> None:
    cache = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"src_dst must|dst_cache must"):
        call(cache)
    assert torch.equal(cache, torch.ones(6, 4))


def build_arguments() -> tuple[Any, ...]:
    query, key, value = build_fused(3, 4, 2, 16, torch.float32)
    caches = build_poisoned_caches(4, 8, 2, 16, torch.float32)
    return query, key, value, torch.arange(3), build_cos_sin_cache(32, 16), *caches, torch.arange(3)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(3, 64), "query must be"),
        (1, torch.zeros(2, 2, 16), "key must be"),
        (1, torch.zeros(3, 2, 16, dtype=torch.bfloat16), "key must be"),
        (2, torch.zeros(3, 1, 16), "value must be"),
        (3, None, "positions must be"),
        (3, torch.arange(3, dtype=torch.int32), "positions must be"),
        (4, torch.zeros(32, 18), "cos_sin_cache must be"),
        (4, torch.zeros(32, 7), "cos_sin_cache must be"),
        (5, torch.zeros(4, 8, 1, 16), "key_cache must be"),
        (6, torch.zeros(4, 8, 2, 16, dtype=torch.bfloat16), "value_cache must be"),
        (7, torch.arange(2), "slot_mapping must be"),
        (7, torch.arange(3, dtype=torch.int32), "slot_mapping must be"),
    ],
)
def test_wrong_arguments_are_refused(isa: str, index: int, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_and_cache(*replace_arguments(build_arguments(), index, value))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (3, torch.tensor([0, 32, 1]), r"positions\[1\] must be"),
        (3, torch.tensor([0, 1, -1]), r"positions\[2\] must be"),
        (7, torch.tensor([32, 0, 1]), r"slot_mapping\[0\] must be"),
    ],
)
def test_wrong_indices_are_refused_before_memory_is_touched(
    native_isa: str, index: int, value: object, message: str
) -> None:
    arguments = replace_arguments(build_arguments(), index, value)
    before = arguments[0].clone()
    with pytest.raises(ValueError, match=message):
        rope_and_cache(*arguments)
    assert torch.equal(arguments[0], before)
    assert arguments[5].isnan().all()
