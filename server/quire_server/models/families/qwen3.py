"""Qwen 3, the dense models: Qwen 2's windows, no biases, and a norm over each head of query and key."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire_server.models.families.llama import LLAMA_LAYER, LLAMA_WEIGHTS
from quire_server.models.families.llama import build_spec as build_llama_spec
from quire_server.models.families.qwen2 import sliding_windows
from quire_server.models.spec import DecoderSpec
from quire_server.models.weight_map import Family

_DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128}


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError."""
    spec = build_llama_spec(_DEFAULTS | dict(config) | {"mlp_bias": False})
    return replace(
        spec,
        architecture="Qwen3ForCausalLM",
        attention=replace(spec.attention, has_qk_norm=True),
        sliding_windows=sliding_windows(config, spec.num_layers),
    )


_LAYER = replace(
    LLAMA_LAYER,
    query_norm="model.layers.{layer}.self_attn.q_norm",
    key_norm="model.layers.{layer}.self_attn.k_norm",
)
FAMILY = Family(build_spec=build_spec, weights=replace(LLAMA_WEIGHTS, layer=_LAYER))
