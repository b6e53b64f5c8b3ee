"""Parameter counts against `transformers`, which builds the same models without memory on the meta device."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quire_contract.memory.model_shape import ModelShape
from quire_server.models.footprint import shape_of_config
from quire_server.shared.errors import UnsupportedModelError

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 20}
OPT = {**SMALL, "ffn_dim": 80, "word_embed_proj_dim": 48}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL),
    ("llama", {**WIDE_HEADS, "tie_word_embeddings": True}),
    ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    ("mistral", WIDE_HEADS),
    ("qwen2", GROUPED),
    ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    ("qwen3", WIDE_HEADS),
    ("qwen3", {**WIDE_HEADS, "attention_bias": True, "tie_word_embeddings": True}),
    ("gemma", WIDE_HEADS),
    ("gemma", {**GROUPED, "attention_bias": True}),
    ("gemma2", WIDE_HEADS),
    ("opt", OPT),
    ("opt", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("opt", {**OPT, "enable_bias": False}),
    ("gpt_neox", SMALL),
    ("gpt_neox", {**SMALL, "attention_bias": False, "tie_word_embeddings": True}),
]
REAL: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
    ),
    "SmolLM2-135M": (
        134_515_008,
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
        },
    ),
    "gemma-2b": (
        2_506_172_416,
        {
            "model_type": "gemma",
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
        },
    ),
    "gemma-2-9b": (
        9_241_705_984,
        {
            "model_type": "gemma2",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
        },
    ),
    "opt-350m": (
        331_196_416,
        {
            "model_type": "opt",
            "hidden_size": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
        },
    ),
    "pythia-70m": (
        70_426_624,
        {
            "model_type": "gpt_neox",
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "vocab_size": 50304,
            "max_position_embeddings": 2048,
        },
    ),
}


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "opt": "OPTForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}


def _shape(config: dict[str, Any]) -> ModelShape:
    """A saved model names its class; these configs name their type."""
    return shape_of_config({**config, "architectures": [ARCHITECTURES[config["model_type"]]]})


def _count_parameters(model_type: str, config: dict[str, Any]) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("model_type", "config"), CASES)
def test_small_models_of_every_kind(model_type: str, config: dict[str, Any]) -> None:
    written = AutoConfig.for_model(model_type, **config).to_dict()
    counted = _count_parameters(model_type, config)
    assert _shape(written).num_parameters == counted
    assert _shape({**config, "model_type": model_type}).num_parameters == counted, "defaults left out"


@pytest.mark.parametrize("name", REAL)
def test_published_models(name: str) -> None:
    published, config = REAL[name]
    assert _shape(config).num_parameters == published


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "gemma-2-9b", "opt-350m"])
def test_published_models_as_transformers_builds_them(name: str) -> None:
    published, config = REAL[name]
    settings = {key: value for key, value in config.items() if key != "model_type"}
    assert _count_parameters(config["model_type"], settings) == published


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma2"])
def test_windows_are_those_of_transformers(model_type: str) -> None:
    settings = {**WIDE_HEADS, "num_hidden_layers": 6, "sliding_window": 16}
    if model_type.startswith("qwen"):
        settings |= {"use_sliding_window": True, "max_window_layers": 4}
    config = AutoConfig.for_model(model_type, **settings)
    by_type = getattr(config, "layer_types", None) or ["sliding_attention"] * 6
    shape = _shape({**settings, "model_type": model_type})
    counted = {group.window: len(group.layers) for group in shape.kv_groups}
    assert counted.get(16, 0) == by_type.count("sliding_attention")
    assert counted.get(None, 0) == by_type.count("full_attention")


def test_what_the_server_refuses_is_not_counted() -> None:
    config = AutoConfig.for_model("opt", **OPT, enable_bias=False, layer_norm_elementwise_affine=False).to_dict()
    with pytest.raises(UnsupportedModelError, match="Galactica"):
        _shape(config)
