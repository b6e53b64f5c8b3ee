"""Gemma and Gemma 2: Llama with (1 + weight) norms, scaled and tied embeddings, and GeGLU.

Version 2 adds norms after each half, soft caps, and a window in every other layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quire_server.models.families.llama import LLAMA_LAYER, LLAMA_WEIGHTS, build_attention, build_decoder
from quire_server.models.hf_config import layer_types_of, read_number, require_size, sliding_window_of
from quire_server.models.kinds.attention import AttentionSpec
from quire_server.models.planning.spec import DecoderSpec, LayerNorms
from quire_server.models.planning.weight_map import Family, always

_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "num_key_value_heads": 16}


def build_gemma_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec of Gemma 1. Raises CheckpointError."""
    config = _DEFAULTS | dict(config)
    return _build("GemmaForCausalLM", config, [build_attention(config)] * require_size(config, "num_hidden_layers"))


def build_gemma2_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec of Gemma 2: every other layer, from the first, has a window. Raises CheckpointError."""
    config = _DEFAULTS | {"num_key_value_heads": 4} | dict(config)
    layer_types = layer_types_of(config) or [
        "full_attention" if layer % 2 else "sliding_attention"
        for layer in range(require_size(config, "num_hidden_layers"))
    ]
    window = sliding_window_of(config)
    attention = replace(
        build_attention(config),
        scale=read_number(config, "query_pre_attn_scalar", 256) ** -0.5,
        soft_cap=_soft_cap_of(config, "attn_logit_softcapping", 50.0),
    )
    windows = [window if kind == "sliding_attention" else None for kind in layer_types]
    spec = _build("Gemma2ForCausalLM", config, attention.with_windows(windows))
    assert spec.final_norm is not None
    norms = LayerNorms.alike("sandwich", spec.final_norm)
    return replace(
        spec.map_layers(lambda _, layer: replace(layer, norms=norms)),
        logit_soft_cap=_soft_cap_of(config, "final_logit_softcapping", 30.0),
    )


def _soft_cap_of(config: Mapping[str, Any], key: str, default: float) -> float | None:
    """Return a cap; null means none."""
    return None if config.get(key, default) is None else read_number(config, key, default)


def _build(architecture: str, config: Mapping[str, Any], attentions: Sequence[AttentionSpec]) -> DecoderSpec:
    # Gemma's configs say "gelu" and mean its tanh form.
    name = config.get("hidden_activation") or config.get("hidden_act") or "gelu"
    activation = "gelu_pytorch_tanh" if name == "gelu" else name
    config = dict(config) | {"mlp_bias": False, "hidden_act": activation}
    spec = build_decoder(architecture, config, attentions, norm_weight_offset=1.0)
    return replace(spec, embedding_scale=spec.hidden_size**0.5)


_GEMMA2_LAYER = replace(
    LLAMA_LAYER,
    attention_output_norm="model.layers.{layer}.post_attention_layernorm",
    feed_forward_norm="model.layers.{layer}.pre_feedforward_layernorm",
    feed_forward_output_norm="model.layers.{layer}.post_feedforward_layernorm",
)
GEMMA = Family(build_spec=build_gemma_spec, build_weights=always(LLAMA_WEIGHTS))
GEMMA2 = Family(build_spec=build_gemma2_spec, build_weights=always(replace(LLAMA_WEIGHTS, layers=(_GEMMA2_LAYER,))))
