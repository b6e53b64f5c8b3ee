"""The references against computations that share no code with them: torch, transformers, and numpy by brute force."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as apply_gptj_rotary
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from quire_kernels import reference
from quire_kernels.testing import PagedBatch, assert_close, build_cos_sin_cache, build_paged_batch

MIXED = [(1, 1), (1, 37), (7, 7), (20, 50), (1, 16), (16, 16), (3, 65)]


def attend_contiguously(
    batch: PagedBatch, scale: float, window: int | None, soft_cap: float | None, slopes: torch.Tensor | None
) -> torch.Tensor:
    """Attend per sequence on contiguous keys and values with an explicit additive mask; soft cap by hand."""
    outputs = []
    starts = batch.query_start_loc.tolist()
    for row, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
        query = batch.query[starts[row] : starts[row + 1]].transpose(0, 1)  # [heads, query_len, head_dim]
        group = query.shape[0] // key.shape[1]
        key, value = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (key, value))
        rows = torch.arange(key.shape[1] - query.shape[1], key.shape[1])[:, None]
        columns = torch.arange(key.shape[1])[None, :]
        is_seen = columns <= rows
        if window is not None:
            is_seen &= columns > rows - window
        mask = torch.zeros(query.shape[0], *is_seen.shape).masked_fill(~is_seen, -math.inf)
        if slopes is not None:
            mask = mask + slopes[:, None, None] * (columns - rows)
        if soft_cap is None:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        else:
            out = torch.softmax(torch.tanh(query @ key.mT * scale / soft_cap) * soft_cap + mask, dim=-1) @ value
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 9, 48])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("has_alibi", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (4, 4), (5, 1)])
def test_paged_attention_equals_torch_on_contiguous_kv(
    num_heads: int, num_kv_heads: int, window: int | None, soft_cap: float | None, has_alibi: bool
) -> None:
    batch = build_paged_batch(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=16, block_size=8)
    slopes = 2.0 ** -torch.arange(1, num_heads + 1).float() if has_alibi else None
    actual = reference.paged_attention_ref(
        *batch.arguments, scale=0.3, sliding_window=window, soft_cap=soft_cap, alibi_slopes=slopes
    )
    assert_close(actual, attend_contiguously(batch, 0.3, window, soft_cap, slopes))


def test_paged_attention_takes_sequences_without_queries() -> None:
    batch = build_paged_batch([(0, 5), (2, 9), (0, 0)], num_heads=2, num_kv_heads=1, head_dim=8)
    actual = reference.paged_attention_ref(*batch.arguments, scale=1.0)
    assert_close(actual, attend_contiguously(batch, 1.0, None, None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_llama(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(72, eps=1e-5)
    norm.weight.data = torch.rand(72) + 0.5
    x = torch.randn(5, 72).to(dtype)
    with torch.no_grad():
        assert_close(reference.rms_norm_ref(x, norm.weight, 1e-5), norm(x.float()))


@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_equals_torch(has_bias: bool) -> None:
    x, weight, bias = torch.randn(5, 72) * 3 + 1, torch.rand(72), torch.randn(72) if has_bias else None
    centered = x.double() - x.double().mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(reference.layer_norm_ref(x, weight, bias, 1e-5), expected + (0 if bias is None else bias))


def test_norms_add_and_return_the_residual() -> None:
    x, residual, weight = torch.randn(4, 8), torch.randn(4, 8), torch.rand(8)
    for out, total, alone in (
        (*reference.rms_norm_ref(x, weight, 1e-6, residual), reference.rms_norm_ref(x + residual, weight, 1e-6)),
        (
            *reference.layer_norm_ref(x, weight, None, 1e-6, residual),
            reference.layer_norm_ref(x + residual, weight, None, 1e-6),
        ),
    ):
        assert_close(total, x + residual)
        assert_close(out, alone)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("gelu", lambda x: x * 0.5 * (1 + torch.special.erf(x / math.sqrt(2)))),
        (
            "gelu_tanh",
            lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
        ("relu", lambda x: torch.where(x > 0, x, 0.0)),
    ],
)
def test_activations_equal_their_formulas(kind: str, expected: object) -> None:
    assert callable(expected)
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)[None]
    assert_close(reference.activation_ref(x.float(), kind), expected(x))
    gate_up = torch.cat((x, x.flip(-1)), dim=-1)
    assert_close(reference.gated_activation_ref(gate_up.float(), kind), expected(x) * x.flip(-1))


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        reference.activation_ref(torch.zeros(1), "swish")


def test_neox_rotation_equals_llama() -> None:
    config = LlamaConfig(head_dim=32, hidden_size=96, num_attention_heads=3, max_position_embeddings=128)
    positions = torch.tensor([3, 0, 77])
    query, key = torch.randn(3, 3, 32), torch.randn(3, 1, 32)
    cos, sin = LlamaRotaryEmbedding(config)(query, positions[None])
    expected = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    cos_sin_cache = build_cos_sin_cache(128, 32)
    for x, rotated in zip((query, key), expected, strict=True):
        actual = reference.rotate_ref(x, positions, cos_sin_cache, is_interleaved=False)
        assert_close(actual, rotated[0].transpose(0, 1))


def test_interleaved_rotation_equals_gptj() -> None:
    positions = torch.tensor([3, 0, 77])
    cos_sin_cache = build_cos_sin_cache(128, 16)
    x = torch.randn(3, 2, 24)
    cos, sin = cos_sin_cache[positions].chunk(2, dim=-1)
    expected = torch.cat((apply_gptj_rotary(x[None, ..., :16], sin[None], cos[None])[0], x[..., 16:]), dim=-1)
    assert_close(reference.rotate_ref(x, positions, cos_sin_cache, is_interleaved=True), expected)


def test_rope_and_cache_writes_slots() -> None:
    query, key, value = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    key_cache, value_cache = torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8)
    expected_query = query.clone()
    reference.rope_and_cache_ref(query, key, value, None, None, key_cache, value_cache, torch.tensor([7, -1, 2]))
    assert torch.equal(query, expected_query)
    for cache, rows in ((key_cache, key), (value_cache, value)):
        assert torch.equal(cache[3, 1], rows[0])
        assert torch.equal(cache[1, 0], rows[2])
        assert cache.count_nonzero() == 16


def sample_by_brute_force(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> int:
    """Sample one row with Python lists and sorting, as the docstring of filter_logits_ref says."""
    if temperature < 1e-5:
        return int(np.argmax(logits))
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    probabilities = weights / weights.sum()
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = [token for token in order if probabilities[token] >= min_p * probabilities[order[0]]]
    if 1 <= top_k <= len(logits):
        kept = kept[:top_k]
    if top_p < 1.0:
        mass = np.cumsum([probabilities[token] for token in kept])
        kept = kept[: int(np.searchsorted(mass, top_p * mass[-1])) + 1]
    kept = sorted(token for token in kept if probabilities[token] > 0)
    cumulative = np.cumsum([probabilities[token] for token in kept])
    return kept[min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(kept) - 1)]


@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [-1, 0, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_sampling_equals_brute_force(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(12, 41, generator=generator) * 2).round(decimals=1)  # with ties
    uniform = torch.rand(12, generator=generator, dtype=torch.float64)
    rows = [torch.full((12,), x, dtype=torch.float64) for x in (temperature, top_p, min_p)]
    actual = reference.sample_tokens_ref(logits, rows[0], torch.full((12,), top_k), rows[1], rows[2], uniform)
    expected = [
        sample_by_brute_force(row.numpy(), temperature, top_k, top_p, min_p, u)
        for row, u in zip(logits, uniform.tolist(), strict=True)
    ]
    assert actual.tolist() == expected


def test_token_logprobs_equal_log_softmax() -> None:
    logits = torch.randn(6, 50)
    tokens = torch.arange(6) * 7
    logprob, rank, top_logprobs, top_ids = reference.token_logprobs_ref(logits, tokens, 4)
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert_close(logprob, expected[torch.arange(6), tokens])
    ordered = expected.argsort(-1, descending=True)
    assert rank.tolist() == [ordered[row].tolist().index(token) + 1 for row, token in enumerate(tokens.tolist())]
    assert torch.equal(top_ids, ordered[:, :4])
    assert_close(top_logprobs, expected.gather(1, top_ids))
