"""`linear`, `pack_weight` and `gather_rows` on every instruction set against products in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quire_kernels import PackedWeight, gather_rows, linear, pack_weight
from quire_kernels._cpu import native
from quire_kernels.testing import assert_close

NUM_TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 64, 67, 300]
SHAPES = [(1, 1), (7, 3), (65, 1), (1, 576), (65, 577), (31, 576), (32, 64), (100, 31), (96, 576), (160, 1536)]

only_native = pytest.mark.parametrize("isa", native.supported_isas(), indirect=True)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, in float64, with entries of about one."""
    result = x.double() @ weight.double().T
    return result if bias is None else result + bias.double()


def scaled(weight: Tensor) -> Tensor:
    """Keep the product's entries near one whatever in_features is: the tolerances are absolute there."""
    return (weight.float() * weight.shape[1] ** -0.5).to(weight.dtype)


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_product(isa: str, out_features: int, in_features: int) -> None:
    weight = scaled(random(out_features, in_features))
    bias = random(out_features, dtype=torch.float32)
    packed = pack_weight(weight)
    for num_tokens in NUM_TOKENS:
        x = random(num_tokens, in_features)
        assert_close(linear(x, packed), product(x, weight).bfloat16())
        assert_close(linear(x, packed, bias), product(x, weight, bias).bfloat16())


@only_native
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 40, 300])
def test_logits_keep_the_precision_of_float32_sums(isa: str, num_tokens: int) -> None:
    weight, x = scaled(random(1000, 577)), random(num_tokens, 577)
    logits = linear(x, pack_weight(weight), out_dtype=torch.float32)
    assert logits.dtype == torch.float32
    assert_close(logits, product(x, weight).float())


@pytest.mark.parametrize("num_tokens", [1, 9, 33])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float32])
def test_bias_and_result_dtypes(
    isa: str, num_tokens: int, bias_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    weight, x, bias = scaled(random(45, 64)), random(num_tokens, 64), random(45, dtype=bias_dtype)
    out = linear(x, pack_weight(weight), bias, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or torch.bfloat16)
    assert_close(out.bfloat16(), product(x, weight, bias).bfloat16())


@pytest.mark.parametrize("num_tokens", [1, 5, 20, 70])
def test_many_blocks_of_rows_and_panels(isa: str, num_tokens: int) -> None:
    """Sizes past the block that fits a cache: wide in k, so that a few rows are a block of their own."""
    weight, x = scaled(random(70, 20000)), random(num_tokens, 20000)
    assert_close(linear(x, pack_weight(weight)), product(x, weight).bfloat16())


@pytest.mark.parametrize("out_features", [1024, 1000, 1056])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_results_larger_than_a_cache(isa: str, out_features: int, out_dtype: torch.dtype) -> None:
    """Such results are written past the caches where their rows are whole cache lines, and not otherwise."""
    weight, x = scaled(random(out_features, 64)), random(2200, 64)
    out = linear(x, pack_weight(weight), out_dtype=out_dtype)
    assert_close(out.bfloat16(), product(x, weight).bfloat16())


@only_native
@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("num_tokens", [1, 100, 700])
def test_any_number_of_threads_gives_the_same_bits(isa: str, num_threads: int, num_tokens: int) -> None:
    weight, x = scaled(random(200, 576)), random(num_tokens, 576)
    packed, before = pack_weight(weight), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = linear(x, packed)
        torch.set_num_threads(num_threads)
        actual = linear(x, packed)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("in_features", [576, 577])
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 40])
def test_strided_rows(isa: str, num_tokens: int, in_features: int) -> None:
    """A slice of a wider tensor is read in place; what lies beyond the slice is NaN and must not be read into it."""
    wide = torch.full((num_tokens, 700), torch.nan, dtype=torch.bfloat16)
    x = wide[:, 3 : 3 + in_features]
    x.copy_(random(num_tokens, in_features))
    weight = scaled(random(65, in_features))
    assert_close(linear(x, pack_weight(weight)), product(x, weight).bfloat16())


@pytest.mark.parametrize("rows", [(7,), (32, 32), (64, 32, 32), (5, 27, 1, 40), (1, 1, 1), (33, 31, 65)])
@pytest.mark.parametrize("in_features", [576, 35])
def test_parts_are_stacked(isa: str, rows: tuple[int, ...], in_features: int) -> None:
    parts = [scaled(random(count, in_features)) for count in rows]
    packed, x = pack_weight(parts), random(20, in_features)
    assert packed.out_features == sum(rows)
    assert torch.equal(gather_rows(packed, torch.arange(sum(rows))), torch.cat(parts))
    assert torch.equal(linear(x, packed), linear(x, pack_weight(torch.cat(parts))))


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_gathered_rows_are_the_packed_ones(isa: str, out_features: int, in_features: int) -> None:
    weight = random(out_features, in_features)
    ids = torch.randint(0, out_features, (50,))
    rows = gather_rows(pack_weight(weight), ids)
    assert torch.equal(rows, weight[ids])
    assert rows.is_contiguous()


def test_packing_reads_strided_weights(isa: str) -> None:
    wide, x = random(40, 200), random(3, 64)
    for weight in (wide[:, 30:94], wide[:, 30:94].t().contiguous().t(), wide[::2, 0:64]):
        assert torch.equal(gather_rows(pack_weight(weight), torch.arange(weight.shape[0])), weight)
        assert_close(linear(x, pack_weight(scaled(weight))), product(x, scaled(weight)).bfloat16())


def test_no_tokens(isa: str) -> None:
    packed = pack_weight(random(33, 64))
    assert linear(random(0, 64), packed).shape == (0, 33)
    assert gather_rows(packed, torch.empty(0, dtype=torch.int64)).shape == (0, 64)


def test_nan_and_infinity_reach_the_result(isa: str) -> None:
    x = random(20, 64)
    x[3, 5], x[7, 63] = torch.nan, torch.inf
    out = linear(x, pack_weight(random(40, 64).abs() + 1))
    assert out[3].isnan().all()
    assert out[7].isposinf().all()
    assert out[[i for i in range(20) if i not in (3, 7)]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_run_on_torch(isa: str, dtype: torch.dtype) -> None:
    weight, x, bias = scaled(random(33, 64, dtype=dtype)), random(5, 64, dtype=dtype), random(33, dtype=torch.float32)
    packed = pack_weight(weight)
    assert not packed.is_native
    assert packed.data.data_ptr() == weight.data_ptr()
    assert_close(linear(x, packed, bias), product(x, weight, bias).to(dtype))
    assert torch.equal(gather_rows(packed, torch.tensor([32, 0])), weight[[32, 0]])
    assert linear(x, packed, out_dtype=torch.float32).dtype == torch.float32


def test_a_native_weight_is_a_copy_and_says_its_size(isa: str) -> None:
    weight = random(33, 65)
    packed = pack_weight(weight)
    assert packed.is_native == (isa != native.NO_ISA)
    assert packed.size_bytes == (2 * 64 * 96 if packed.is_native else 2 * 33 * 65)
    assert packed.dtype == torch.bfloat16


# Which argument the error has to name, and the call. Functions, since nothing may load a library before it is built.
REFUSALS: dict[str, tuple[str, Callable[[PackedWeight, Tensor, Tensor], object]]] = {
    "x of one dimension": ("x", lambda packed, x, ids: linear(x[0], packed)),
    "x of three dimensions": ("x", lambda packed, x, ids: linear(x[None], packed)),
    "x of another width": ("x", lambda packed, x, ids: linear(random(4, 63), packed)),
    "x of another dtype": ("x", lambda packed, x, ids: linear(x.float(), packed)),
    "x on another device": ("x", lambda packed, x, ids: linear(x.to("meta"), packed)),
    "bias too short": ("bias", lambda packed, x, ids: linear(x, packed, random(32))),
    "bias of another dtype": ("bias", lambda packed, x, ids: linear(x, packed, random(33).half())),
    "bias of two dimensions": ("bias", lambda packed, x, ids: linear(x, packed, random(33, 1))),
    "bias with gaps": ("bias", lambda packed, x, ids: linear(x, packed, random(66)[::2])),
    "no weight": ("weight", lambda packed, x, ids: pack_weight([])),
    "an empty weight": ("weight", lambda packed, x, ids: pack_weight(random(0, 64))),
    "a vector as weight": ("weight", lambda packed, x, ids: pack_weight(random(64))),
    "parts of different widths": ("weight", lambda packed, x, ids: pack_weight([random(3, 64), random(3, 65)])),
    "parts of different dtypes": ("weight", lambda packed, x, ids: pack_weight([random(3, 64), random(3, 64).float()])),
    "ids of another dtype": ("ids", lambda packed, x, ids: gather_rows(packed, ids.int())),
    "ids of two dimensions": ("ids", lambda packed, x, ids: gather_rows(packed, ids[None])),
    "an id past the end": ("ids", lambda packed, x, ids: gather_rows(packed, torch.tensor([0, 33]))),
    "a negative id": ("ids", lambda packed, x, ids: gather_rows(packed, torch.tensor([0, -1]))),
}


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_arguments_that_do_not_fit_are_refused_by_name(isa: str, name: str) -> None:
    argument, call = REFUSALS[name]
    packed = pack_weight(random(33, 64))
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        call(packed, random(4, 64), torch.tensor([0]))


@only_native
def test_gaps_between_features_and_half_results_are_refused(isa: str) -> None:
    packed = pack_weight(random(33, 64))
    with pytest.raises(ValueError, match="contiguous in its last dimension"):
        linear(random(4, 128)[:, ::2], packed)
    with pytest.raises(ValueError, match="out_dtype"):
        linear(random(4, 64), packed, out_dtype=torch.float16)
