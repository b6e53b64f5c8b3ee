"""Activations on every instruction set against their references."""

import pytest
import torch

from quire_kernels import activation, gated_activation
from quire_kernels.reference import activation_ref, gated_activation_ref
from quire_kernels.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["silu", "gelu", "gelu_tanh", "relu"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (3, 17), (2, 1536), (70, 300), (1, 20000)])
def test_activations(isa: str, num_tokens: int, size: int, kind: str, dtype: torch.dtype) -> None:
    x = (torch.randn(num_tokens, 2 * size) * 4).to(dtype)
    for actual, expected in (
        (activation(x, kind), activation_ref(x.float(), kind)),
        (gated_activation(x, kind), gated_activation_ref(x.float(), kind)),
    ):
        assert actual.dtype == dtype
        assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(isa: str, kind: str) -> None:
    x = torch.tensor([[0.0, -0.0, 1e-20, 30.0, -30.0, 1e4, -1e4, 1e30, -1e30]])
    assert_close(activation(x, kind), activation_ref(x, kind))
    assert activation(torch.tensor([[torch.nan]]), kind).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_strided(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 300).to(dtype)[:, 7:107]
    assert_close(gated_activation(x, "silu"), gated_activation_ref(x.float(), "silu"))


def test_empty(isa: str) -> None:
    assert gated_activation(torch.empty(0, 8), "silu").shape == (0, 4)


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.zeros(2, 4), "swish", "kind must be"),
        (torch.zeros(4), "silu", "gate_up must be"),
        (torch.zeros(2, 4, dtype=torch.int64), "silu", "gate_up must be"),
        (torch.zeros(4, 2).mT, "silu", "gate_up must be"),
        (torch.zeros(2, 5), "silu", "gate_up must be of an even size"),
    ],
)
def test_wrong_arguments_are_refused(isa: str, x: torch.Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_activation(x, kind)
