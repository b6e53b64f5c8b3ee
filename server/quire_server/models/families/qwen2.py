"""Qwen 2 and 2.5: Llama with biases on query, key and value, and an optional window in the upper layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire_server.models.families.llama import LLAMA_WEIGHTS
from quire_server.models.families.llama import build_spec as build_llama_spec
from quire_server.models.spec import DecoderSpec
from quire_server.models.weight_map import Family


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError."""
    spec = build_llama_spec({"num_key_value_heads": 32} | dict(config) | {"attention_bias": False, "mlp_bias": False})
    return replace(
        spec,
        architecture="Qwen2ForCausalLM",
        attention=replace(spec.attention, has_qkv_bias=True),
        sliding_windows=sliding_windows(config, spec.num_layers),
    )


def sliding_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's window: none without `use_sliding_window`, else by `layer_types` or `max_window_layers`."""
    window = config.get("sliding_window", 4096)
    if not config.get("use_sliding_window", False) or window is None:
        return (None,) * num_layers
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = config.get("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


FAMILY = Family(build_spec=build_spec, weights=LLAMA_WEIGHTS)
