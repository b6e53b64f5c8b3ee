"""Qwen 2 and 2.5: Llama with biases on query, key and value, and an optional window in the upper layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire_server.models.families.llama import LLAMA_WEIGHTS, build_attention, build_decoder
from quire_server.models.hf_config import require
from quire_server.models.planning.spec import DecoderSpec
from quire_server.models.planning.weight_map import Family, always


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError."""
    config = {"num_key_value_heads": 32} | dict(config) | {"attention_bias": False, "mlp_bias": False}
    attention = replace(build_attention(config), has_qkv_bias=True)
    windows = sliding_windows(config, require(config, "num_hidden_layers"))
    return build_decoder("Qwen2ForCausalLM", config, attention.with_windows(windows))


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


FAMILY = Family(build_spec=build_spec, build_weights=always(LLAMA_WEIGHTS))
