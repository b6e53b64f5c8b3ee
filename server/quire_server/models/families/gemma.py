"""Gemma and Gemma 2: Llama with (1 + weight) norms, scaled and tied embeddings, and GeGLU.

Version 2 adds norms after each half, soft caps, and a window in every other layer.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire_server.models.families.llama import LLAMA_LAYER, LLAMA_WEIGHTS
from quire_server.models.families.llama import build_spec as build_llama_spec
from quire_server.models.spec import DecoderSpec
from quire_server.models.weight_map import Family

_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "num_key_value_heads": 16}


def build_gemma_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec of Gemma 1. Raises CheckpointError."""
    # Gemma's configs say "gelu" and mean its tanh form.
    name = config.get("hidden_activation") or config.get("hidden_act") or "gelu"
    activation = "gelu_pytorch_tanh" if name == "gelu" else name
    spec = build_llama_spec(_DEFAULTS | dict(config) | {"mlp_bias": False, "hidden_act": activation})
    return replace(
        spec,
        architecture="GemmaForCausalLM",
        norm=replace(spec.norm, weight_offset=1.0),
        embedding_scale=spec.hidden_size**0.5,
    )


def build_gemma2_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec of Gemma 2: every other layer, from the first, has a window. Raises CheckpointError."""
    spec = build_gemma_spec({"num_key_value_heads": 4} | dict(config))
    layer_types = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(spec.num_layers)
    ]
    window = config.get("sliding_window", 4096)
    return replace(
        spec,
        architecture="Gemma2ForCausalLM",
        norm_placement="sandwich",
        attention=replace(
            spec.attention,
            scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
            soft_cap=config.get("attn_logit_softcapping", 50.0),
        ),
        sliding_windows=tuple(window if kind == "sliding_attention" else None for kind in layer_types),
        logit_soft_cap=config.get("final_logit_softcapping", 30.0),
    )


_GEMMA2_LAYER = replace(
    LLAMA_LAYER,
    post_attention_norm="model.layers.{layer}.post_attention_layernorm",
    mlp_norm="model.layers.{layer}.pre_feedforward_layernorm",
    post_mlp_norm="model.layers.{layer}.post_feedforward_layernorm",
)
GEMMA = Family(build_spec=build_gemma_spec, weights=LLAMA_WEIGHTS)
GEMMA2 = Family(build_spec=build_gemma2_spec, weights=replace(LLAMA_WEIGHTS, layer=_GEMMA2_LAYER))
