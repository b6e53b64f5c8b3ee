"""Paged attention on every instruction set against its reference, and what it promises beyond numbers."""

import functools
from typing import Any

import pytest
import torch

from quire_kernels import paged_attention
from quire_kernels._cpu import native
from quire_kernels.reference import paged_attention_ref
from quire_kernels.testing import PagedBatch, assert_close, build_paged_batch, replace_arguments

DTYPES = [torch.float32, torch.bfloat16]
DECODE = ((1, 1), (1, 700), (1, 129), (1, 16), (1, 33), (1, 512))
PREFILL = ((5, 5), (70, 130), (33, 200), (3, 300), (34, 34))
MIXED = ((1, 1), (40, 40), (1, 530), (0, 9), (17, 150), (1, 64))
LONG = ((1, 1100), (6, 2100))  # split along the keys


@functools.cache
def build_case(
    lens: tuple[tuple[int, int], ...],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    window: int | None,
    soft_cap: float | None,
    has_alibi: bool,
) -> tuple[PagedBatch, dict[str, Any], torch.Tensor]:
    """Return a batch, the options, and the reference's result in float32: the same for every instruction set."""
    batch = build_paged_batch(
        lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, block_size=block_size
    )
    slopes = 2.0 ** -torch.arange(1, num_heads + 1).float() if has_alibi else None
    options = {
        "scale": head_dim**-0.5,
        "sliding_window": window,
        "soft_cap": soft_cap,
        "alibi_slopes": slopes,
    }
    return batch, options, paged_attention_ref(*batch.in_float32().arguments, **options)


def compare(
    lens: tuple[tuple[int, int], ...],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    block_size: int = 16,
    window: int | None = None,
    soft_cap: float | None = None,
    has_alibi: bool = False,
) -> None:
    batch, options, expected = build_case(
        lens, num_heads, num_kv_heads, head_dim, dtype, block_size, window, soft_cap, has_alibi
    )
    actual = paged_attention(*batch.arguments, **options)
    assert actual.dtype == dtype
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (4, 4), (5, 1), (7, 1), (16, 2), (24, 1)])
def test_query_groups(
    native_isa: str, num_heads: int, num_kv_heads: int, lens: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    compare(lens, num_heads, num_kv_heads, 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 128, 2000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (5, 1)])
def test_sequences_split_along_their_keys(
    native_isa: str, num_heads: int, num_kv_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    compare(LONG, num_heads, num_kv_heads, 32, dtype, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 37, 64, 80, 96, 128, 192, 256, 300])
def test_head_dims(native_isa: str, head_dim: int, dtype: torch.dtype) -> None:
    compare(((1, 70), (1, 150), (40, 77)), 6, 2, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 32, 256])
def test_block_sizes(native_isa: str, block_size: int, dtype: torch.dtype) -> None:
    compare(MIXED, 3, 1, 32, dtype, block_size=block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 17, 128, 600])
def test_sliding_windows(native_isa: str, window: int, dtype: torch.dtype) -> None:
    compare(MIXED, 4, 2, 64, dtype, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("soft_cap", [None, 0.5, 50.0])
@pytest.mark.parametrize("has_alibi", [False, True])
def test_score_rules(
    native_isa: str, has_alibi: bool, soft_cap: float | None, window: int | None, dtype: torch.dtype
) -> None:
    compare(MIXED, 6, 2, 64, dtype, window=window, soft_cap=soft_cap, has_alibi=has_alibi)


def test_torch_path() -> None:
    with native.use_isa(native.NO_ISA):
        compare(MIXED, 6, 2, 64, torch.bfloat16, window=50, soft_cap=2.0, has_alibi=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_stay_finite(native_isa: str, dtype: torch.dtype) -> None:
    batch = build_paged_batch(MIXED, num_heads=4, num_kv_heads=2, head_dim=64, dtype=dtype)
    expected = paged_attention_ref(*batch.in_float32().arguments, scale=40.0)
    assert_close(paged_attention(*batch.arguments, scale=40.0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_may_be_a_view_of_a_fused_buffer(native_isa: str, dtype: torch.dtype) -> None:
    batch = build_paged_batch(MIXED, num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    fused = torch.full((batch.query.shape[0], 15 * 64), torch.nan, dtype=dtype)
    view = fused[:, : 9 * 64].view(-1, 9, 64)
    view.copy_(batch.query)
    expected = paged_attention(*batch.arguments, scale=0.125)
    actual = paged_attention(view, *batch.arguments[1:], scale=0.125)
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_caches_may_be_views(native_isa: str, dtype: torch.dtype) -> None:
    batch = build_paged_batch(MIXED, num_heads=4, num_kv_heads=2, head_dim=32, dtype=dtype)
    both = torch.stack((batch.key_cache, batch.value_cache), dim=1)  # [num_blocks, 2, ...]
    actual = paged_attention(batch.query, both[:, 0], both[:, 1], *batch.arguments[3:], scale=0.2)
    assert torch.equal(actual, paged_attention(*batch.arguments, scale=0.2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_before_the_window_are_never_read(native_isa: str, dtype: torch.dtype) -> None:
    window, block_size = 40, 8
    batch = build_paged_batch(
        [(1, 300), (20, 300)], num_heads=4, num_kv_heads=2, head_dim=32, block_size=block_size, dtype=dtype
    )
    expected = paged_attention_ref(*batch.in_float32().arguments, scale=0.2, sliding_window=window)
    for row, first_query in enumerate((299, 280)):  # freed: the null block, which holds NaN, stands in
        batch.block_table[row, : (first_query - window + 1) // block_size] = 0
    assert_close(paged_attention(*batch.arguments, scale=0.2, sliding_window=window), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_32_bits(native_isa: str, dtype: torch.dtype) -> None:
    """The caches are 2^31 elements and more, of which only the last blocks are ever touched."""
    small = build_paged_batch([(1, 40), (9, 60)], num_heads=4, num_kv_heads=2, head_dim=64, dtype=dtype)
    used = small.key_cache.shape[0]
    shape = (2**31 // small.key_cache[0].numel() + used, *small.key_cache.shape[1:])
    key_cache, value_cache = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    key_cache[-used:], value_cache[-used:] = small.key_cache, small.value_cache
    table = small.block_table + (shape[0] - used)
    assert key_cache.numel() > 2**31
    actual = paged_attention(small.query, key_cache, value_cache, table, *small.arguments[4:], scale=0.125)
    assert_close(actual, paged_attention_ref(*small.in_float32().arguments, scale=0.125))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(native_isa: str, dtype: torch.dtype) -> None:
    batch = build_paged_batch(MIXED, num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    first = paged_attention(*batch.arguments, scale=0.125)
    assert torch.equal(first, paged_attention(*batch.arguments, scale=0.125))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_feel_its_neighbours(native_isa: str, dtype: torch.dtype, num_threads: int) -> None:
    """Bitwise, whatever the batch and the number of threads: the cut depends on the sequence alone."""
    lens = MIXED + LONG
    batch = build_paged_batch(lens, num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    together = paged_attention(*batch.arguments, scale=0.125)
    starts = batch.query_start_loc.tolist()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(paged_attention(*batch.arguments, scale=0.125), together)
        for row in range(len(lens)):
            rows = slice(starts[row], starts[row + 1])
            start_loc = torch.tensor([0, starts[row + 1] - starts[row]], dtype=torch.int32)
            alone = paged_attention(
                batch.query[rows],
                batch.key_cache,
                batch.value_cache,
                batch.block_table[row : row + 1],
                start_loc,
                batch.seq_lens[row : row + 1],
                scale=0.125,
            )
            assert torch.equal(alone, together[rows])
    finally:
        torch.set_num_threads(before)


def test_empty_batch(isa: str) -> None:
    batch = build_paged_batch([], num_heads=2, num_kv_heads=1, head_dim=8)
    assert paged_attention(*batch.arguments, scale=1.0).shape == (0, 2, 8)


def test_float16_runs_on_torch(native_isa: str) -> None:
    compare(MIXED, 4, 2, 32, torch.float16)


BAD_TENSORS = [
    (0, torch.zeros(3, 4), "query must be"),
    (0, torch.zeros(3, 4, 16, dtype=torch.int32), "query must be"),
    (0, torch.zeros(3, 16, 4).mT, "query must be"),
    (0, torch.zeros(3, 3, 16), "key_cache must be"),
    (1, torch.zeros(4, 16, 2, 8), "key_cache must be"),
    (2, torch.zeros(4, 16, 1, 16), "value_cache must be"),
    (2, torch.zeros(4, 16, 2, 16, dtype=torch.bfloat16), "value_cache must be"),
    (3, torch.zeros(1, 1, dtype=torch.int64), "block_table must be"),
    (3, torch.zeros(2, 1, dtype=torch.int32), "block_table must be"),
    (4, torch.tensor([0, 3]), "query_start_loc must be"),
    (4, torch.tensor([0], dtype=torch.int32), "query_start_loc must be"),
    (5, torch.tensor([9]), "seq_lens must be"),
    (5, torch.zeros(1, 1, dtype=torch.int32), "seq_lens must be"),
]


@pytest.mark.parametrize(("index", "value", "message"), BAD_TENSORS)
def test_wrong_tensors_are_refused(isa: str, index: int, value: torch.Tensor, message: str) -> None:
    batch = build_paged_batch([(3, 9)], num_heads=4, num_kv_heads=2, head_dim=16)
    with pytest.raises(ValueError, match=message):
        paged_attention(*replace_arguments(batch.arguments, index, value), scale=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be"),
        ({"scale": 1.0, "sliding_window": 0}, "sliding_window must be"),
        ({"scale": 1.0, "soft_cap": 0.0}, "soft_cap must be"),
        ({"scale": 1.0, "alibi_slopes": torch.zeros(3)}, "alibi_slopes must be"),
    ],
)
def test_wrong_options_are_refused(isa: str, options: dict[str, Any], message: str) -> None:
    batch = build_paged_batch([(3, 9)], num_heads=4, num_kv_heads=2, head_dim=16)
    with pytest.raises(ValueError, match=message):
        paged_attention(*batch.arguments, **options)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (3, torch.tensor([[1, 99]], dtype=torch.int32), "block_table must be"),
        (3, torch.tensor([[-1, 1]], dtype=torch.int32), "block_table must be"),
        (4, torch.tensor([0, 2], dtype=torch.int32), "query_start_loc must be"),
        (4, torch.tensor([1, 3], dtype=torch.int32), "query_start_loc must be"),
        (5, torch.tensor([2], dtype=torch.int32), "seq_lens must be"),
        (5, torch.tensor([33], dtype=torch.int32), "seq_lens must be"),
    ],
)
def test_wrong_indices_are_refused_before_memory_is_touched(
    native_isa: str, index: int, value: torch.Tensor, message: str
) -> None:
    batch = build_paged_batch([(3, 20)], num_heads=4, num_kv_heads=2, head_dim=16)
    with pytest.raises(ValueError, match=message):
        paged_attention(*replace_arguments(batch.arguments, index, value), scale=1.0)
