"""The specification of every op: plain torch, computed in float32, correct on any device.

Native code is tested against these functions, and devices without native code run them. They know nothing of the
public wrappers' argument checks. Results come back in the dtype of the first argument.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR_ZERO_TEMPERATURE = 1e-5
"""A lower temperature means the most likely token."""


def rms_norm_ref(
    x: Tensor,  # [num_tokens, hidden_size]
    weight: Tensor,  # [hidden_size] float32
    eps: float,
    residual: Tensor | None = None,  # [num_tokens, hidden_size]
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide by the root mean square (Zhang and Sennrich 2019); a residual is added first, and the sum returned too."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    hidden = total.float()
    normalized = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    out = (normalized * weight).to(x.dtype)
    return out if residual is None else (out, total)


def layer_norm_ref(
    x: Tensor,  # [num_tokens, hidden_size]
    weight: Tensor,  # [hidden_size] float32
    bias: Tensor | None,  # [hidden_size] float32
    eps: float,
    residual: Tensor | None = None,  # [num_tokens, hidden_size]
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise mean and variance (Ba et al. 2016); a residual is added first, and the sum returned too."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    out = F.layer_norm(total.float(), weight.shape, weight, bias, eps).to(x.dtype)
    return out if residual is None else (out, total)


def activation_ref(x: Tensor, kind: str) -> Tensor:
    """Apply silu, gelu, gelu_tanh or relu to each element."""
    value = x.float()
    if kind == "silu":
        out = F.silu(value)
    elif kind == "gelu":
        out = F.gelu(value)
    elif kind == "gelu_tanh":
        out = F.gelu(value, approximate="tanh")
    elif kind == "relu":
        out = F.relu(value)
    else:
        raise ValueError(f"kind must be silu, gelu, gelu_tanh or relu, got {kind!r}")
    return out.to(x.dtype)


def gated_activation_ref(gate_up: Tensor, kind: str) -> Tensor:  # [num_tokens, 2 * size] -> [num_tokens, size]
    """Multiply the activated first half with the second half (Shazeer 2020)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (activation_ref(gate, kind) * up).to(gate_up.dtype)


def rotate_ref(
    x: Tensor,  # [num_tokens, num_heads, head_dim]
    positions: Tensor,  # [num_tokens] int64
    cos_sin_cache: Tensor,  # [max_position, rotary_dim] float32
    *,
    is_interleaved: bool,
) -> Tensor:
    """Rotate the first rotary_dim elements of each head by its position (Su et al. 2021)."""
    rotary_dim = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    rotary, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    if is_interleaved:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
    else:
        first, second = rotary.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if is_interleaved else torch.cat(pair, dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def rope_and_cache_ref(
    query: Tensor,  # [num_tokens, num_heads, head_dim], rotated in place
    key: Tensor,  # [num_tokens, num_kv_heads, head_dim], rotated in place
    value: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    positions: Tensor | None,  # [num_tokens] int64
    cos_sin_cache: Tensor | None,  # [max_position, rotary_dim] float32
    key_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    slot_mapping: Tensor,  # [num_tokens] int64, -1: not written
    *,
    is_interleaved: bool = False,
) -> None:
    """Rotate query and key in place and write key and value to their slots."""
    if cos_sin_cache is not None and positions is not None:
        query.copy_(rotate_ref(query, positions, cos_sin_cache, is_interleaved=is_interleaved))
        key.copy_(rotate_ref(key, positions, cos_sin_cache, is_interleaved=is_interleaved))
    token_ids = torch.nonzero(slot_mapping >= 0).squeeze(1)
    slots = slot_mapping[token_ids]
    block_size = key_cache.shape[1]
    block_ids, offsets = slots // block_size, slots % block_size
    key_cache[block_ids, offsets] = key[token_ids].to(key_cache.dtype)
    value_cache[block_ids, offsets] = value[token_ids].to(value_cache.dtype)


def copy_blocks_ref(cache: Tensor, src_dst: Sequence[tuple[int, int]]) -> None:  # [num_blocks, ...]
    """Copy whole blocks inside one cache, in the order given."""
    for src, dst in src_dst:
        cache[dst].copy_(cache[src])


def swap_blocks_ref(src_cache: Tensor, dst_cache: Tensor, src_dst: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks from one cache to another, such as from the device to the host."""
    for src, dst in src_dst:
        dst_cache[dst].copy_(src_cache[src])


def paged_attention_ref(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    key_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    block_table: Tensor,  # [num_seqs, max_blocks_per_seq] int32
    query_start_loc: Tensor,  # [num_seqs + 1] int32
    seq_lens: Tensor,  # [num_seqs] int32
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,  # [num_heads] float32
) -> Tensor:  # [num_tokens, num_heads, head_dim]
    """Attend causally to each sequence's own KV; a query sees the last `sliding_window` tokens, itself included."""
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    block_size = key_cache.shape[1]
    starts = query_start_loc.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        context_len = seq_len - (end - start)
        first = 0 if sliding_window is None else max(0, context_len - sliding_window + 1)
        blocks = block_table[row, first // block_size : math.ceil(seq_len / block_size)].long()
        skipped = first // block_size * block_size
        key = key_cache[blocks].flatten(0, 1)[first - skipped : seq_len - skipped]
        value = value_cache[blocks].flatten(0, 1)[first - skipped : seq_len - skipped]
        query_positions = torch.arange(context_len, seq_len, device=query.device)
        key_positions = torch.arange(first, seq_len, device=query.device)
        distances = key_positions[None, :] - query_positions[:, None]
        out[start:end] = _attend(
            query[start:end], key, value, distances, scale, sliding_window, soft_cap, alibi_slopes
        ).to(query.dtype)
    return out


def _attend(
    query: Tensor,  # [query_len, num_heads, head_dim]
    key: Tensor,  # [num_keys, num_kv_heads, head_dim]
    value: Tensor,  # [num_keys, num_kv_heads, head_dim]
    distances: Tensor,  # [query_len, num_keys] key position - query position
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:  # [query_len, num_heads, head_dim] float32
    num_kv_heads = key.shape[1]
    grouped = query.float().reshape(
        query.shape[0], num_kv_heads, -1, query.shape[2]
    )  # [query_len, num_kv_heads, group, head_dim]
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key.float()) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.float().view(num_kv_heads, -1, 1, 1) * distances
    is_hidden = distances > 0
    if sliding_window is not None:
        is_hidden = is_hidden | (distances <= -sliding_window)
    probabilities = torch.softmax(scores.masked_fill(is_hidden, -math.inf), dim=-1)
    return torch.einsum("hgqk,khd->qhgd", probabilities, value.float()).flatten(1, 2)


def filter_logits_ref(
    logits: Tensor,  # [num_rows, vocab_size] float32
    temperature: Tensor,  # [num_rows], all positive
    top_k: Tensor,  # [num_rows]; below 1 or above vocab_size: every token
    top_p: Tensor,  # [num_rows]; from 1: every token
    min_p: Tensor,  # [num_rows]; 0: every token
) -> Tensor:  # [num_rows, vocab_size] float64, rows sum to 1
    """Return the distribution that is sampled: temperature, then min_p, then top_k, then top_p over the survivors.

    Every filter keeps a prefix of the tokens by descending logit, equal logits by ascending token id. min_p keeps
    tokens of at least min_p times the highest probability; top_p keeps the shortest prefix whose mass reaches it.
    """
    vocab_size = logits.shape[1]
    ordered, token_ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(ordered.double() / temperature.double()[:, None], dim=-1)
    ranks = torch.arange(vocab_size, device=logits.device)
    limits = torch.where((top_k < 1) | (top_k > vocab_size), vocab_size, top_k)
    is_kept = (probabilities >= min_p.double()[:, None] * probabilities[:, :1]) & (ranks < limits[:, None])
    is_kept[:, 0] = True
    probabilities = probabilities * is_kept
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    mass_before = probabilities.cumsum(-1) - probabilities
    is_kept &= (mass_before < top_p.double()[:, None]) | (top_p >= 1.0)[:, None]
    is_kept[:, 0] = True
    probabilities = probabilities * is_kept
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(1, token_ids, probabilities)


def sample_tokens_ref(
    logits: Tensor,  # [num_rows, vocab_size] float32
    temperature: Tensor,  # [num_rows]
    top_k: Tensor,  # [num_rows]
    top_p: Tensor,  # [num_rows]
    min_p: Tensor,  # [num_rows]
    uniform: Tensor,  # [num_rows] in [0, 1)
) -> Tensor:  # [num_rows] int64
    """Return the first token, by id, whose cumulative probability exceeds `uniform`.

    Greedy rows return their first maximum, and so do rows whose maximum is not finite.
    """
    greedy = first_argmax(logits)
    is_greedy = (temperature < NEAR_ZERO_TEMPERATURE) | ~logits.amax(-1).isfinite()
    rows = torch.nonzero(~is_greedy).squeeze(1)
    if rows.numel() == 0:
        return greedy
    probabilities = filter_logits_ref(logits[rows], temperature[rows], top_k[rows], top_p[rows], min_p[rows])
    cumulative = probabilities.cumsum(-1)
    threshold = uniform[rows].double()[:, None] * cumulative[:, -1:]
    is_beyond = (cumulative > threshold) & (probabilities > 0)
    last_kept = probabilities.shape[1] - 1 - first_argmax((probabilities > 0).flip(-1).int())
    sampled = torch.where(is_beyond.any(-1), first_argmax(is_beyond.int()), last_kept)
    return greedy.index_copy(0, rows, sampled)


def first_argmax(x: Tensor) -> Tensor:  # [num_rows, size] -> [num_rows] int64
    """Return the lowest index of each row's maximum (torch.argmax promises no order)."""
    size = x.shape[-1]
    indices = torch.arange(size, device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), indices, size).amin(-1).clamp_max(size - 1)


def token_logprobs_ref(
    logits: Tensor,  # [num_rows, vocab_size]
    token_ids: Tensor,  # [num_rows] int64
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probabilities of the raw distribution.

    Returns:
        logprob [num_rows] of the given tokens, rank [num_rows] int64 (1: the most likely; equal logits share the
        better rank), top_logprobs [num_rows, num_top] descending, top_ids [num_rows, num_top] int64.
    """
    logits = logits.float()
    chosen = logits.gather(1, token_ids[:, None])
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    rank = (logits > chosen).sum(-1) + 1
    top_logits, top_ids = torch.topk(logits, num_top, dim=-1)
    return (chosen - normalizer).squeeze(1), rank, top_logits - normalizer, top_ids
