"""Groups of the KV cache, and how a block is laid out."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_contract.memory.dtypes import FitError
from quire_contract.memory.kv_cache import KVCacheGroup, KVCacheSpec, KVFormat, max_blocks_in_window

BF16 = KVFormat(dtype="bfloat16")


def group(layers: tuple[int, ...], heads: int, dim: int, *, window: int | None = None) -> KVCacheGroup:
    kind = "full" if window is None else "window"
    return KVCacheGroup(kind=kind, layers=layers, num_kv_heads=heads, key_dim=dim, value_dim=dim, window=window)


LATENT = KVCacheGroup(kind="latent", layers=tuple(range(61)), num_kv_heads=1, key_dim=512 + 64, value_dim=0)


def spec(*groups: KVCacheGroup, kv_format: KVFormat = BF16) -> KVCacheSpec:
    return KVCacheSpec(groups=groups, format=kv_format)


def test_published_sizes() -> None:
    """Bytes of a token as the models' makers and others give them."""
    llama_8b = spec(group(tuple(range(32)), 8, 128))
    assert llama_8b.bytes_per_block(16) == 16 * 128 * 1024  # 128 KiB
    deepseek_v3 = spec(LATENT)
    assert deepseek_v3.bytes_per_block(64) == 64 * 70_272  # 70.272 KB


def test_layers_that_differ_add_up() -> None:
    """A few layers of DeciLM (heads differ) and of Gemma 2 (windows do)."""
    mixed = spec(group((0, 3), 8, 128), group((1,), 2, 128), group((2, 4), 4, 256, window=4096))
    per_token = 2 * 2 * (2 * 8 * 128 + 2 * 128 + 2 * 4 * 256)
    assert mixed.bytes_per_block(32) == 32 * per_token
    assert [place.layer for place in mixed.places(32)] == [0, 1, 2, 3, 4]


def test_scales_stand_behind_all_values() -> None:
    fp8 = spec(group((0, 1), 2, 8), kv_format=KVFormat(dtype="fp8", scale_bytes_per_token=4, scale_bytes_per_block=2))
    values, scales = 2 * (2 * 4 * 2 * 8), 2 * (2 * 2 * (4 * 4 + 2))
    assert fp8.bytes_per_block(4) == values + scales
    first, second = fp8.places(4)
    assert (first.key_offset, first.value_offset, second.key_offset, second.value_offset) == (0, 64, 128, 192)
    assert (first.scales_offset, second.scales_offset, second.scales_bytes) == (256, 328, 72)


def test_the_window_that_lets_blocks_go_is_one_of_all_layers() -> None:
    windowed, other, full = group((0,), 1, 4, window=8), group((1,), 1, 4, window=9), group((2,), 1, 4)
    assert spec(windowed).uniform_window == 8
    assert spec(windowed, replace(windowed, layers=(1,), num_kv_heads=2)).uniform_window == 8
    assert spec(windowed, other).uniform_window is None
    assert spec(windowed, full).uniform_window is None
    assert spec(full).uniform_window is None


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 20), st.integers(0, 60))
def test_blocks_in_a_window_are_the_most_that_any_step_sees(window: int, block: int, step: int, start: int) -> None:
    first_seen, last = max(0, start - window + 1), start + step - 1
    seen = {position // block for position in range(first_seen, last + 1)}
    assert len(seen) <= max_blocks_in_window(window, block, step)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 20))
def test_blocks_in_a_window_are_reached(window: int, block: int, step: int) -> None:
    starts = range(window, window + 2 * block)
    seen = [len({p // block for p in range(start - window + 1, start + step)}) for start in starts]
    assert max(seen) == max_blocks_in_window(window, block, step)


def test_a_sequence_holds_no_more_than_its_window() -> None:
    windowed, full = spec(group((0,), 1, 4, window=32)), spec(group((0,), 1, 4))
    given_sizes = {"block_size": 16, "max_num_batched_tokens": 16}
    assert [windowed.max_held_blocks(n, **given_sizes) for n in (1, 48, 64, 10**6)] == [1, 3, 4, 4]
    assert full.max_held_blocks(10**6, **given_sizes) == math.ceil(10**6 / 16)


class TestShares:
    def test_heads_are_dealt_out_and_copied_where_they_are_too_few(self) -> None:
        whole = spec(group((0, 1), 8, 16), group((2,), 2, 16))
        heads = [each.num_kv_heads for each in whole.share(tensor_parallel_size=4, layers=range(3)).groups]
        assert heads == [2, 1]

    def test_a_latent_is_whole_on_every_device(self) -> None:
        assert spec(LATENT).share(tensor_parallel_size=8, layers=range(61)) == spec(LATENT)

    def test_a_stage_has_its_layers_by_their_numbers(self) -> None:
        share = spec(group((0, 2), 4, 8), group((1, 3), 4, 8, window=5)).share(
            tensor_parallel_size=1, layers=range(2, 4)
        )
        assert [(each.layers, each.window) for each in share.groups] == [((2,), None), ((3,), 5)]
        assert spec(group((0, 2), 4, 8), group((1,), 2, 8)).share(tensor_parallel_size=1, layers=[1]).groups == (
            group((1,), 2, 8),
        )


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    st.sampled_from(["float32", "bfloat16", "fp8"]),
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from([1, 2, 16]),
)
def test_a_block_is_its_parts(
    shapes: list[tuple[int, int, bool]], dtype: str, per_token: int, per_block: int, block_size: int
) -> None:
    """No two parts overlap, none is outside, and elements and scales start where they may."""
    groups = []
    for layer, (heads, dim, is_latent) in enumerate(shapes):
        plain = group((layer,), heads, dim)
        groups.append(replace(plain, kind="latent", value_dim=0) if is_latent else plain)
    kv_format = KVFormat(dtype=dtype, scale_bytes_per_token=per_token, scale_bytes_per_block=per_block)
    whole = spec(*groups, kv_format=kv_format)
    taken: list[tuple[int, int]] = []
    item = kv_format.element_bytes
    for place, (heads, dim, is_latent) in zip(whole.places(block_size), shapes, strict=True):
        size = block_size * heads * dim * item
        taken.append((place.key_offset, place.key_offset + size))
        if not is_latent:
            taken.append((place.value_offset, place.value_offset + size))
        scales = (1 if is_latent else 2) * heads * (block_size * per_token + per_block)
        taken.append((place.scales_offset, place.scales_offset + scales))
        assert place.key_offset % item == place.value_offset % item == 0
    taken.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(taken))
    assert taken[-1][1] <= whole.bytes_per_block(block_size) < taken[-1][1] + 8
    assert whole.bytes_per_block(block_size) % 4 == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "ascending"),
        ({"layers": (1, 1)}, "ascending"),
        ({"layers": (2, 1)}, "ascending"),
        ({"window": 5}, "a window of at least 1"),
        ({"kind": "window"}, "a window of at least 1"),
        ({"kind": "window", "window": 0}, "a window of at least 1"),
        ({"kind": "latent"}, "'latent' cannot keep"),
        ({"value_dim": 0}, "'full' cannot keep"),
        ({"num_kv_heads": 0}, "'full' cannot keep"),
    ],
)
def test_groups_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(FitError, match=message):
        replace(group((0, 1), 2, 8), **change)


def test_a_layer_is_in_one_group() -> None:
    with pytest.raises(FitError, match="in one group"):
        spec(group((0, 1), 1, 4), group((1, 2), 1, 4))
    with pytest.raises(FitError, match="there must be one"):
        spec()
