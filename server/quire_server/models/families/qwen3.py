"""Qwen 3, the dense models: Qwen 2's windows, no biases, and a norm over each head of query and key."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire_server.models.families.llama import (
    LLAMA_ATTENTION,
    LLAMA_LAYER,
    LLAMA_WEIGHTS,
    build_attention,
    build_decoder,
)
from quire_server.models.families.qwen2 import sliding_windows
from quire_server.models.hf_config import read_number
from quire_server.models.planning.parts import NormSpec
from quire_server.models.planning.spec import DecoderSpec
from quire_server.models.planning.weight_map import Family, always

_DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128}


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError."""
    config = _DEFAULTS | dict(config) | {"mlp_bias": False}
    norm = NormSpec(kind="rms", eps=read_number(config, "rms_norm_eps", 1e-6, can_be_zero=True))
    attention = replace(build_attention(config), qk_norm=norm)
    return build_decoder("Qwen3ForCausalLM", config, attention.with_windows(sliding_windows(config)))


_ATTENTION = replace(
    LLAMA_ATTENTION,
    query_norm="model.layers.{layer}.self_attn.q_norm",
    key_norm="model.layers.{layer}.self_attn.k_norm",
)
_WEIGHTS = replace(LLAMA_WEIGHTS, layers=(replace(LLAMA_LAYER, attention=_ATTENTION),))
FAMILY = Family(build_spec=build_spec, build_weights=always(_WEIGHTS))
