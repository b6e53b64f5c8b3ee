"""Paged attention on every instruction set against its reference, and what it promises beyond numbers."""

import pytest
import torch

from quire_kernels import paged_attention
from quire_kernels.reference import paged_attention_ref
from quire_kernels.testing import assert_close, build_paged_batch, replace_arguments

DTYPES = [torch.float32, torch.bfloat16]
DECODE = [(1, 1), (1, 700), (1, 129), (1, 16), (1, 33), (1, 512), (1, 1100)]
PREFILL = [(5, 5), (130, 130), (33, 200), (3, 300), (70, 71), (2, 2500)]
MIXED = [(1, 1), (40, 40), (1, 530), (0, 9), (17, 150), (1, 64), (6, 2100)]


def compare(lens: list[tuple[int, int]], num_heads: int, num_kv_heads: int, head_dim: int, **options: object) -> None:
    """Run one batch natively and by the reference in float32, and compare."""
    layout = {key: options.pop(key) for key in ("block_size", "dtype") if key in options}
    batch = build_paged_batch(lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **layout)  # type: ignore[arg-type]
    scale = head_dim**-0.5
    actual = paged_attention(*batch.arguments, scale=scale, **options)  # type: ignore[arg-type]
    assert actual.dtype == batch.query.dtype
    assert_close(actual, paged_attention_ref(*batch.in_float32().arguments, scale=scale, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (8, 8), (5, 1), (7, 1), (16, 2), (24, 1)])
def test_query_groups(
    isa: str, num_heads: int, num_kv_heads: int, lens: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    compare(lens, num_heads, num_kv_heads, 64, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 37, 64, 80, 96, 128, 192, 256, 300])
def test_head_dims(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    compare([(1, 70), (1, 600), (40, 77)], 6, 2, head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 32, 256])
def test_block_sizes(isa: str, block_size: int, dtype: torch.dtype) -> None:
    compare(MIXED, 3, 1, 32, dtype=dtype, block_size=block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 17, 128, 600, 5000])
def test_sliding_windows(isa: str, window: int, dtype: torch.dtype) -> None:
    compare(MIXED, 4, 2, 64, dtype=dtype, sliding_window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("soft_cap", [None, 0.5, 50.0])
@pytest.mark.parametrize("has_alibi", [False, True])
def test_score_rules(
    isa: str, has_alibi: bool, soft_cap: float | None, window: int | None, dtype: torch.dtype
) -> None:
    slopes = 2.0 ** -torch.arange(1, 7).float() if has_alibi else None
    compare(MIXED, 6, 2, 64, dtype=dtype, sliding_window=window, soft_cap=soft_cap, alibi_slopes=slopes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_stay_finite(isa: str, dtype: torch.dtype) -> None:
    batch = build_paged_batch(MIXED, num_heads=4, num_kv_heads=2, head_dim=64, dtype=dtype)
    expected = paged_attention_ref(*batch.in_float32().arguments, scale=40.0)
    assert_close(paged_attention(*batch.arguments, scale=40.0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_may_be_a_view_of_a_fused_buffer(isa: str, dtype: torch.dtype) -> None:
    batch = build_paged_batch(MIXED, num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    fused = torch.full((batch.query.shape[0], 15 * 64), torch.nan, dtype=dtype)
    view = fused[:, : 9 * 64].view(-1, 9, 64)
    view.copy_(batch.query)
    expected = paged_attention(*batch.arguments, scale=0.125)
    actual = paged_attention(view, *batch.arguments[1:], scale=0.125)
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_caches_may_be_views(isa: str, dtype: torch.dtype) -> None:
    batch = build_paged_batch(MIXED, num_heads=4, num_kv_heads=2, head_dim=32, dtype=dtype)
    both = torch.stack((batch.key_cache, batch.value_cache), dim=1)  # [num_blocks, 2, ...]
    actual = paged_attention(batch.query, both[:, 0], both[:, 1], *batch.arguments[3:], scale=0.2)
    assert torch.equal(actual, paged_attention(*batch.arguments, scale=0.2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_before_the_window_are_never_read(isa: str, dtype: torch.dtype) -> None:
    window, block_size = 40, 8
    batch = build_paged_batch(
        [(1, 300), (20, 300)], num_heads=4, num_kv_heads=2, head_dim=32, block_size=block_size, dtype=dtype
    )
    expected = paged_attention_ref(*batch.in_float32().arguments, scale=0.2, sliding_window=window)
    for row, first_query in enumerate((299, 280)):  # freed: the null block, which holds NaN, stands in
        batch.block_table[row, : (first_query - window + 1) // block_size] = 0
    assert_close(paged_attention(*batch.arguments, scale=0.2, sliding_window=window), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_32_bits(isa: str, dtype: torch.dtype) -> None:
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
def test_same_bits_every_time(isa: str, dtype: torch.dtype) -> None:
    batch = build_paged_batch(MIXED, num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    first = paged_attention(*batch.arguments, scale=0.125)
    assert torch.equal(first, paged_attention(*batch.arguments, scale=0.125))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_feel_its_neighbours(isa: str, dtype: torch.dtype, num_threads: int) -> None:
    """Bitwise, whatever the batch and the number of threads: the cut depends on the sequence alone."""
    batch = build_paged_batch(MIXED, num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    together = paged_attention(*batch.arguments, scale=0.125)
    starts = batch.query_start_loc.tolist()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for row in range(len(MIXED)):
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
            if isa == "none":
                assert_close(alone, together[rows])  # torch's products depend on the number of threads
            else:
                assert torch.equal(alone, together[rows])
    finally:
        torch.set_num_threads(before)


def test_empty_batch(isa: str) -> None:
    batch = build_paged_batch([], num_heads=2, num_kv_heads=1, head_dim=8)
    assert paged_attention(*batch.arguments, scale=1.0).shape == (0, 2, 8)


def test_float16_runs_on_torch(isa: str) -> None:
    compare(MIXED, 4, 2, 32, dtype=torch.float16)


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
def test_wrong_options_are_refused(isa: str, options: dict[str, object], message: str) -> None:
    batch = build_paged_batch([(3, 9)], num_heads=4, num_kv_heads=2, head_dim=16)
    with pytest.raises(ValueError, match=message):
        paged_attention(*batch.arguments, **options)  # type: ignore[arg-type]


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
    isa: str, index: int, value: torch.Tensor, message: str
) -> None:
    if isa == "none":
        return  # torch checks its own indexing
    batch = build_paged_batch([(3, 20)], num_heads=4, num_kv_heads=2, head_dim=16)
    with pytest.raises(ValueError, match=message):
        paged_attention(*replace_arguments(batch.arguments, index, value), scale=1.0)
