"""Qwen 2 and 2.5: Llama with biases on query, key and value, and an optional window in the upper layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire_server.models.families.llama import LLAMA_WEIGHTS, build_attention, build_decoder
from quire_server.models.hf_config import layer_types_of, read_number, require_size, sliding_window_of
from quire_server.models.planning.spec import DecoderSpec
from quire_server.models.planning.weight_map import Family, always


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError."""
    config = {"num_key_value_heads": 32} | dict(config) | {"attention_bias": False, "mlp_bias": False}
    attention = replace(build_attention(config), has_qkv_bias=True)
    return build_decoder("Qwen2ForCausalLM", config, attention.with_windows(sliding_windows(config)))


def sliding_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return each layer's window: none without `use_sliding_window`, else by `layer_types` or `max_window_layers`."""
    num_layers, layer_types = require_size(config, "num_hidden_layers"), layer_types_of(config)
    if not config.get("use_sliding_window", False):
        return (None,) * num_layers
    window = sliding_window_of(config)
    if layer_types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = read_number(config, "max_window_layers", 28, can_be_zero=True)
    return tuple(window if layer >= first else None for layer in range(num_layers))


FAMILY = Family(build_spec=build_spec, build_weights=always(LLAMA_WEIGHTS))
