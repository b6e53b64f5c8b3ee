"""Mistral 7B and its kin: Llama with a sliding window (version 0.1) and grouped heads."""

from collections.abc import Mapping
from typing import Any

from quire_server.models.families.llama import LLAMA_WEIGHTS, build_attention, build_decoder
from quire_server.models.hf_config import require_size, sliding_window_of
from quire_server.models.planning.spec import DecoderSpec
from quire_server.models.planning.weight_map import Family, always

_DEFAULT_NUM_KV_HEADS = 8


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Without `sliding_window` there is the default one; null means none. Raises CheckpointError."""
    defaults = {"num_key_value_heads": _DEFAULT_NUM_KV_HEADS}
    config = defaults | dict(config) | {"attention_bias": False, "mlp_bias": False}
    windows = [sliding_window_of(config)] * require_size(config, "num_hidden_layers")
    return build_decoder("MistralForCausalLM", config, build_attention(config).with_windows(windows))


FAMILY = Family(build_spec=build_spec, build_weights=always(LLAMA_WEIGHTS))
