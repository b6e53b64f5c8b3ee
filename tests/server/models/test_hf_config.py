"""A config that has something else where a size or a number should be: refused by name, whatever the family."""

from contextlib import suppress
from typing import Any

import pytest

from quire_server.models.footprint import shape_of_config
from quire_server.models.registry import plan_model
from quire_server.shared.errors import CheckpointError, UnsupportedModelError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "quantization_config": None,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
QWEN = LLAMA | {"use_sliding_window": True, "max_window_layers": 2}
GEMMA = LLAMA | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
OPT = LLAMA | {"ffn_dim": 96, "word_embed_proj_dim": 32, "activation_function": "relu", "enable_bias": True}
NEOX = LLAMA | {"layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True}
CONFIGS: dict[str, dict[str, Any]] = {
    name: config | {"architectures": [f"{name}ForCausalLM"]}
    for name, config in {
        "Llama": LLAMA, "Mistral": LLAMA, "Qwen2": QWEN, "Qwen3": QWEN, "Gemma": GEMMA, "Gemma2": GEMMA, "OPT": OPT,
        "GPTNeoX": NEOX,
    }.items()
}  # fmt: skip
SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "max_position_embeddings"]  # fmt: skip
NO_SIZES: list[Any] = [0, -128, 64.0, "64", True, [64], {}, 2**40]
BAD: list[Any] = [*NO_SIZES, None, -1.5, 0.0, float("inf"), float("nan"), 1e-300, 1e300, 10**400, False, "", [], [{}]]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "attention_factor": None,
        "truncate": True,
    },
    "longrope": {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "attention_factor": 1.2},
}


def plan_if_refused_by_type(config: dict[str, Any]) -> None:
    """Anything but a refusal that says so is a fault: it would end a start with a traceback, and a download with it."""
    with suppress(CheckpointError, UnsupportedModelError):
        shape_of_config(config)


@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
@pytest.mark.parametrize("field", SIZES)
def test_a_size_that_is_none_is_named(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"'{field}' is "):
        plan_model(LLAMA | {field: value})


@pytest.mark.parametrize("family", CONFIGS)
def test_nothing_in_a_config_ends_in_a_raw_error(family: str) -> None:
    config = CONFIGS[family]
    assert shape_of_config(config).num_layers == 4
    for field in config:
        for value in BAD:
            plan_if_refused_by_type(config | {field: value})


@pytest.mark.parametrize("kind", SCALINGS)
def test_nothing_in_a_rope_scaling_ends_in_a_raw_error(kind: str) -> None:
    scaling = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS[kind]}
    assert shape_of_config(LLAMA | {"rope_scaling": scaling}).num_layers == 4
    for field in scaling:
        for value in BAD:
            plan_if_refused_by_type(LLAMA | {"rope_scaling": scaling | {field: value}})
            plan_if_refused_by_type(LLAMA | {"rope_parameters": scaling | {field: value}, "head_dim": 2})


@pytest.mark.parametrize("family", ["Gemma2", "Qwen2", "Qwen3"])
def test_layer_types_make_no_layers(family: str) -> None:
    """A list that is too short is refused; the end of one that is too long (a pruned model's) is left out."""
    with pytest.raises(CheckpointError, match=r"'layer_types' is .* not a list of one kind for each of 4 layers"):
        plan_model(CONFIGS[family] | {"layer_types": ["full_attention"] * 3})
    spec = plan_model(CONFIGS[family] | {"num_hidden_layers": 3}).spec
    assert spec.sliding_windows == (32, None, 32)


def test_a_layer_type_that_nobody_runs_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="'linear_attention'"):
        plan_model(CONFIGS["Qwen3"] | {"layer_types": ["linear_attention"] * 4})
