"""RMSNorm and LayerNorm on every instruction set against their references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quire_kernels import layer_norm, rms_norm
from quire_kernels.reference import layer_norm_ref, rms_norm_ref
from quire_kernels.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 5, 16, 31, 64, 100, 576, 1000]


def run_norms(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> list[tuple[Any, Any]]:
    """Return (actual, expected in float32) of both norms."""
    wide, wide_residual = x.float(), None if residual is None else residual.float()
    if residual is not None:  # the sum is rounded before it is normalised
        wide, wide_residual = (x.float() + residual.float()).to(x.dtype).float(), torch.zeros_like(wide)
    return [
        (rms_norm(x, weight, 1e-5, residual), rms_norm_ref(wide, weight, 1e-5, wide_residual)),
        (layer_norm(x, weight, bias, 1e-5, residual), layer_norm_ref(wide, weight, bias, 1e-5, wide_residual)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_tokens", [1, 3, 200])
def test_norms(isa: str, num_tokens: int, size: int, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(num_tokens, size) * 3 + 1).to(dtype), torch.rand(size) + 0.5
    for bias in (None, torch.randn(size)):
        for actual, expected in run_norms(x, weight, bias, None):
            assert actual.dtype == dtype
            assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norms_with_residual(isa: str, size: int, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(7, size).to(dtype), torch.randn(7, size).to(dtype), torch.rand(size) + 0.5
    before = x.clone(), residual.clone()
    for (actual, total), (expected, expected_total) in run_norms(x, weight, None, residual):
        assert torch.equal(total, expected_total.to(dtype))
        assert_close(actual, expected)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_views(isa: str, dtype: torch.dtype) -> None:
    fused, weight = torch.randn(5, 7 * 32).to(dtype), torch.rand(32)
    heads = fused[:, 64:160].view(5, 3, 32)
    rows = fused[:, 96:128]
    for x in (heads, rows):
        assert not x.is_contiguous()
        residual = fused[:, :96].view(5, 3, 32) if x is heads else fused[:, 32:64]
        for actual, expected in run_norms(x, weight, None, residual):
            assert all(part.is_contiguous() for part in actual)
            assert_close(actual[0], expected[0])


def test_large_values_do_not_overflow_the_mean(isa: str) -> None:
    x = torch.full((2, 64), 1e4) + torch.randn(2, 64)
    centered = x.double() - x.double().mean(-1, keepdim=True)
    expected = centered / centered.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(layer_norm(x, torch.ones(64), None, 0.0).double(), expected, rtol=1e-2, atol=1e-2)


def test_nan_stays_visible(isa: str) -> None:
    x = torch.ones(2, 64)
    x[1, 3] = torch.nan
    for norm in (rms_norm(x, torch.ones(64), 1e-5), layer_norm(x, torch.ones(64), None, 1e-5)):
        assert not norm[0].isnan().any()
        assert norm[1].isnan().all()


def test_empty(isa: str) -> None:
    x = torch.empty(0, 8)
    assert rms_norm(x, torch.ones(8), 1e-5).shape == (0, 8)
    assert layer_norm(x, torch.ones(8), None, 1e-5, x)[1].shape == (0, 8)


WEIGHT = torch.ones(8)
X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.zeros(8), WEIGHT, 1e-5), "x must be"),
        (lambda: rms_norm(torch.zeros(2, 8, dtype=torch.int32), WEIGHT, 1e-5), "x must be"),
        (lambda: rms_norm(torch.zeros(8, 2).mT, WEIGHT, 1e-5), "x must be contiguous"),
        (lambda: rms_norm(X, torch.ones(7), 1e-5), "weight must be"),
        (lambda: rms_norm(X, WEIGHT.bfloat16(), 1e-5), "weight must be"),
        (lambda: rms_norm(X, WEIGHT, 1e-5, torch.zeros(1, 8)), "residual must be"),
        (lambda: rms_norm(X, WEIGHT, 1e-5, X.bfloat16()), "residual must be"),
        (lambda: rms_norm(X, WEIGHT, 1e-5, torch.zeros(8, 2).mT), "residual must be"),
        (lambda: layer_norm(X, WEIGHT, torch.zeros(7), 1e-5), "bias must be"),
    ],
)
def test_wrong_arguments_are_refused(isa: str, call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
