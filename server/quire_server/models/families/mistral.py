"""Mistral 7B and its kin: Llama with a sliding window (version 0.1) and grouped heads."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire_server.models.families.llama import LLAMA_WEIGHTS
from quire_server.models.families.llama import build_spec as build_llama_spec
from quire_server.models.spec import DecoderSpec
from quire_server.models.weight_map import Family

_DEFAULT_WINDOW = 4096
_DEFAULT_NUM_KV_HEADS = 8


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Without `sliding_window` there is the default one; null means none. Raises CheckpointError."""
    defaults = {"num_key_value_heads": _DEFAULT_NUM_KV_HEADS}
    spec = build_llama_spec(defaults | dict(config) | {"attention_bias": False, "mlp_bias": False})
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    return replace(spec, architecture="MistralForCausalLM", sliding_windows=(window,) * spec.num_layers)


FAMILY = Family(build_spec=build_spec, weights=LLAMA_WEIGHTS)
