"""Sampling on every instruction set against the reference's distribution."""

import math

import pytest
import torch
from torch import Tensor

from quire_kernels import sample_tokens, token_logprobs
from quire_kernels.reference import filter_logits_ref
from quire_kernels.testing import replace_arguments

ROWS = 24
FILTERS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.999, 0.0),
    (0, 1e-7, 0.0),
    (0, 1.0, 0.05),
    (0, 1.0, 1.0),
    (40, 0.8, 0.01),
    (700, 0.95, 0.0),
    (0, 0.5, 0.001),
    (-1, 1.0, 0.0),
    (10**6, 0.7, 0.0),
]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: Tensor) -> Tensor:
    rows = [torch.full((len(logits),), x) for x in (temperature, top_k, top_p, min_p)]
    return sample_tokens(logits, *rows, uniform)


def assert_drawn(tokens: Tensor, logits: Tensor, uniform: Tensor, rows: tuple[float, int, float, float]) -> None:
    """Assert that uniform lies in each token's stretch of the reference's CDF, up to rounding in float32."""
    temperature, top_k, top_p, min_p = (torch.full((len(logits),), x) for x in rows)
    cumulative = filter_logits_ref(logits, temperature, top_k, top_p, min_p).cumsum(-1)
    end = cumulative.gather(1, tokens[:, None]).squeeze(1)
    begin = cumulative.gather(1, (tokens - 1).clamp_min(0)[:, None]).squeeze(1) * (tokens > 0)
    assert tokens.dtype == torch.int64
    assert (begin <= uniform + 2e-6).all()
    assert (uniform <= end + 2e-6).all()


@pytest.mark.parametrize("rows", FILTERS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 4099])
def test_draws_follow_the_reference(
    isa: str, vocab_size: int, temperature: float, rows: tuple[int, float, float]
) -> None:
    logits = torch.randn(ROWS, vocab_size) * 3
    logits[::5] = logits[::5].round()  # ties
    logits[1::4, ::3] = -math.inf
    logits[:, vocab_size // 2] = 0.0
    uniform = torch.rand(ROWS)
    tokens = sample(logits, temperature, *rows, uniform)
    assert_drawn(tokens, logits, uniform, (temperature, *rows))
    assert logits.gather(1, tokens[:, None]).isfinite().all()


@pytest.mark.parametrize("rows", [(0, 1.0, 0.0), (0, 0.95, 0.0), (64, 0.95, 0.0), (0, 1.0, 0.02), (2000, 1.0, 0.0)])
@pytest.mark.parametrize("scale", [0.0, 0.1, 4.0])
def test_large_vocabularies(native_isa: str, scale: float, rows: tuple[int, float, float]) -> None:
    logits, uniform = torch.randn(3, 50001) * scale, torch.rand(3)
    assert_drawn(sample(logits, 1.0, *rows, uniform), logits, uniform, (1.0, *rows))


def test_frequencies_follow_the_distribution(isa: str) -> None:
    num_draws = 4000
    logits = torch.log(torch.tensor([0.5, 0.2, 0.2, 0.07, 0.03])).expand(num_draws, 5).contiguous()
    uniform = (torch.arange(num_draws) + 0.5) / num_draws  # stratified: counts are exact up to the boundaries
    counts = torch.bincount(sample(logits, 1.0, 0, 0.85, 0.0, uniform), minlength=5)
    expected = torch.tensor([5 / 9, 2 / 9, 2 / 9, 0.0, 0.0]) * num_draws
    assert (counts - expected).abs().max() <= 2


def test_greedy_takes_the_first_maximum(isa: str) -> None:
    logits = torch.randn(5, 301)
    logits[0, [17, 3, 300]] = 9.0
    logits[1] = -math.inf
    logits[2] = -math.inf
    logits[2, 200] = -3.0
    logits[3] = 1.0
    logits[4, [299, 300]] = 12.0
    for temperature in (0.0, 9e-6):
        assert sample(logits, temperature, 5, 0.5, 0.5, torch.rand(5)).tolist() == [3, 0, 200, 0, 299]


@pytest.mark.parametrize("rows", FILTERS)
def test_only_one_token_left(isa: str, rows: tuple[int, float, float]) -> None:
    logits = torch.full((4, 999), -math.inf)
    logits[:, 998] = -40.0
    uniform = torch.tensor([0.0, 0.5, 0.999, 1.0 - 2**-24])
    assert sample(logits, 1.0, *rows, uniform).tolist() == [998] * 4


def test_rows_differ(isa: str) -> None:
    logits = torch.randn(6, 100)
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 1.0])
    top_k = torch.tensor([0, 0, 3, 10, 0, 1], dtype=torch.int32)
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.9, 1.0, 1.0])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.3, 0.0])
    uniform = torch.rand(6, dtype=torch.float64)
    together = sample_tokens(logits, temperature, top_k, top_p, min_p, uniform)
    for row in range(6):
        one = slice(row, row + 1)
        alone = sample_tokens(logits[one], temperature[one], top_k[one], top_p[one], min_p[one], uniform[one])
        assert alone == together[one]
    assert together[[0, 5]].tolist() == logits[[0, 5]].argmax(-1).tolist()


def test_logits_may_be_strided_rows_and_are_not_written(isa: str) -> None:
    wide = torch.randn(8, 120)
    view, before, uniform = wide[::2, 10:90], wide.clone(), torch.rand(4)
    assert torch.equal(sample(view, 0.8, 20, 0.9, 0.0, uniform), sample(view.contiguous(), 0.8, 20, 0.9, 0.0, uniform))
    assert torch.equal(wide, before)


def test_nan_and_infinite_rows_end_in_a_valid_token(isa: str) -> None:
    logits = torch.randn(3, 50)
    logits[0] = torch.nan
    logits[1, 7] = math.inf
    logits[2] = -math.inf
    tokens = sample(logits, 1.0, 5, 0.9, 0.1, torch.rand(3))
    assert ((tokens >= 0) & (tokens < 50)).all()
    assert tokens[1] == 7


def test_no_rows(isa: str) -> None:
    empty = torch.empty(0)
    assert sample_tokens(torch.empty(0, 9), empty, empty.long(), empty, empty, empty).shape == (0,)


ONE = torch.ones(2)
ARGUMENTS = (torch.zeros(2, 9), ONE, ONE.long(), ONE, ONE, ONE)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(9), "logits must be"),
        (0, torch.zeros(2, 9, dtype=torch.bfloat16), "logits must be"),
        (0, torch.zeros(2, 0), "logits must be"),
        (0, torch.zeros(9, 2).mT, "logits must be"),
        (1, torch.ones(3), "temperature must be"),
        (2, ONE, "top_k must be integers"),
        (3, torch.ones(2, 1), "top_p must be"),
        (4, torch.ones(()), "min_p must be"),
        (5, torch.ones(1), "uniform must be"),
    ],
)
def test_wrong_arguments_are_refused(isa: str, index: int, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_tokens(*replace_arguments(ARGUMENTS, index, value))


def test_token_logprobs(isa: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, -math.inf, 2.0, 1.0]])
    logprob, rank, top_logprobs, top_ids = token_logprobs(logits, torch.tensor([2, 0]), 2)
    expected = torch.log_softmax(logits, dim=-1)
    torch.testing.assert_close(logprob, expected[[0, 1], [2, 0]])
    assert rank.tolist() == [1, 3]
    assert top_ids[1].tolist() == [2, 3]
    torch.testing.assert_close(top_logprobs, expected.gather(1, top_ids))
    assert token_logprobs(logits, torch.tensor([2, 0]), 0)[2].shape == (2, 0)


@pytest.mark.parametrize(
    ("logits", "token_ids", "num_top", "message"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), 1, "logits must be"),
        (torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64), 1, "token_ids must be"),
        (torch.zeros(2, 4), torch.zeros(2), 1, "token_ids must be"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 5, "num_top must be"),
    ],
)
def test_wrong_logprob_arguments_are_refused(logits: Tensor, token_ids: Tensor, num_top: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_logprobs(logits, token_ids, num_top)
