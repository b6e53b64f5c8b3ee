"""Every family against `transformers`: the same logits, and the same greedy answers from a paged, batched cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

GROUPED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
UNGROUPED = {name: value for name, value in GROUPED.items() if name != "num_key_value_heads"}
OPT = {name: value for name, value in UNGROUPED.items() if name != "intermediate_size"} | {"ffn_dim": 96}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
WINDOW = {"sliding_window": 8}
GEMMA2 = (
    GROUPED
    | WINDOW
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 2.0,
    }
)

CASES = [
    pytest.param("llama", GROUPED, id="llama"),
    pytest.param("llama", GROUPED | {"num_key_value_heads": 4, "tie_word_embeddings": True}, id="llama-tied-ungrouped"),
    pytest.param("llama", GROUPED | {"attention_bias": True, "mlp_bias": True, "head_dim": 24}, id="llama-biases"),
    pytest.param("llama", GROUPED | {"rope_parameters": LLAMA3_ROPE}, id="llama-rope-llama3"),
    pytest.param(
        "llama", GROUPED | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, id="llama-rope-linear"
    ),
    pytest.param(
        "llama", GROUPED | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, id="llama-rope-dynamic"
    ),
    pytest.param("llama", GROUPED | {"rope_parameters": YARN}, id="llama-rope-yarn"),
    pytest.param("mistral", GROUPED | {"sliding_window": None}, id="mistral"),
    pytest.param("mistral", GROUPED | WINDOW, id="mistral-window"),
    pytest.param("qwen2", GROUPED | WINDOW, id="qwen2"),
    pytest.param("qwen2", GROUPED | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}, id="qwen2-window"),
    pytest.param("qwen3", GROUPED | {"head_dim": 24}, id="qwen3"),
    pytest.param("gemma", GROUPED | {"head_dim": 24}, id="gemma"),
    pytest.param("gemma2", GEMMA2, id="gemma2"),
    pytest.param("opt", OPT, id="opt"),
    pytest.param("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, id="opt-350m"),
    pytest.param("opt", OPT | {"_remove_final_layer_norm": True, "enable_bias": False}, id="opt-bare"),
    pytest.param("gpt_neox", UNGROUPED, id="gpt_neox"),
    pytest.param("gpt_neox", UNGROUPED | {"use_parallel_residual": False, "rotary_pct": 1.0}, id="gpt_neox-sequential"),
    pytest.param("gpt_neox", UNGROUPED | {"attention_bias": False, "tie_word_embeddings": True}, id="gpt_neox-tied"),
]


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_logits_and_greedy_answers_are_those_of_transformers(
    model_type: str,
    fields: dict[str, Any],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
) -> None:
    tiny = build_tiny_model(model_type, **fields)
    model = tiny.load(max_model_len=256)
    expected = tiny.reference_logits(prompt_of(40))
    torch.testing.assert_close(harness(model).prefill(prompt_of(40)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(harness(model).prefill(prompt_of(40), chunk=7), expected, atol=1e-4, rtol=1e-4)

    prompts = [prompt_of(length) for length in (5, 23)]
    answers = [tiny.reference_greedy(prompt, 64) for prompt in prompts]
    assert harness(model).greedy(prompts, 64) == answers
    assert harness(model, block_size=16, seed=1).greedy(prompts[:1], 64) == answers[:1]


REMOVALS = [
    pytest.param(
        "llama", GROUPED | {"rope_parameters": LLAMA3_ROPE}, {"rope_parameters": {"rope_theta": 500.0}}, id="llama3"
    ),
    pytest.param("llama", GROUPED | {"rope_parameters": YARN}, {"rope_parameters": {"rope_theta": 1000.0}}, id="yarn"),
    pytest.param("mistral", GROUPED | WINDOW, {"sliding_window": None}, id="window"),
    pytest.param("gemma2", GEMMA2, {"attn_logit_softcapping": None}, id="attention-cap"),
    pytest.param("gemma2", GEMMA2, {"final_logit_softcapping": None}, id="logit-cap"),
    pytest.param("gemma2", GEMMA2, {"layer_types": ["full_attention"] * 3}, id="alternating-windows"),
    pytest.param("gemma2", GEMMA2, {"query_pre_attn_scalar": 256}, id="scale"),
    pytest.param("gpt_neox", UNGROUPED, {"use_parallel_residual": False}, id="parallel"),
    pytest.param("gpt_neox", UNGROUPED, {"rope_parameters": {"partial_rotary_factor": 1.0}}, id="partial-rotation"),
]


@pytest.mark.parametrize(("model_type", "fields", "removal"), REMOVALS)
def test_each_feature_shows_in_the_logits(
    model_type: str,
    fields: dict[str, Any],
    removal: dict[str, Any],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
) -> None:
    """Without this, the parity above could hold for models on which a feature has no effect."""
    tiny = build_tiny_model(model_type, **fields)
    expected = tiny.reference_logits(prompt_of(40))
    tiny.edit_config(lambda config: config.update(removal))
    assert (harness(tiny.load()).prefill(prompt_of(40)) - expected).abs().max() > 0.05


def test_bfloat16_stays_near_float32(
    build_tiny_model: Callable[..., Any], harness: Callable[..., Any], prompt_of: Callable[[int], list[int]]
) -> None:
    tiny = build_tiny_model("gemma2", **GEMMA2)
    logits = harness(tiny.load(dtype=torch.bfloat16)).prefill(prompt_of(40))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, tiny.reference_logits(prompt_of(40)), atol=0.1, rtol=0.1)


def test_a_token_without_a_slot_is_not_written(
    build_tiny_model: Callable[..., Any], harness: Callable[..., Any], prompt_of: Callable[[int], list[int]]
) -> None:
    """What the harness relies on: its unused slots stay NaN, so that a wrong read shows."""
    runner = harness(build_tiny_model("llama", **GROUPED).load())
    runner.prefill(prompt_of(5))
    written = sum(int(cache.key.isfinite().all(-1).all(-1).sum()) for cache in runner.kv_caches)
    assert written == 5 * GROUPED["num_hidden_layers"]
