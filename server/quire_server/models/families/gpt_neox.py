"""GPT-NeoX and Pythia: layer norms, partial rotation, parallel halves; query, key and value are stored per head."""

from collections.abc import Mapping
from typing import Any

from quire_server.models.hf_config import derived_head_dim, parse_activation, read_number, require_size
from quire_server.models.kinds.attention import AttentionSpec, AttentionWeights
from quire_server.models.kinds.mlp import MlpSpec, MlpWeights
from quire_server.models.planning.layout import LinearWeights
from quire_server.models.planning.parts import NormSpec
from quire_server.models.planning.spec import DecoderSpec, LayerNorms, LayerSpec
from quire_server.models.planning.weight_map import Family, LayerWeights, WeightMap, always
from quire_server.models.rope import build_rope_spec, scaled_context_len

_LAYER = "gpt_neox.layers.{layer}"
GPT_NEOX_WEIGHTS = WeightMap(
    token_embedding="gpt_neox.embed_in",
    layers=(
        LayerWeights(
            attention=AttentionWeights(
                qkv=LinearWeights(modules=(f"{_LAYER}.attention.query_key_value",), shard_dim=0, layout="grouped"),
                output=LinearWeights(modules=(f"{_LAYER}.attention.dense",), shard_dim=1),
            ),
            feed_forward=MlpWeights(
                input=LinearWeights(modules=(f"{_LAYER}.mlp.dense_h_to_4h",), shard_dim=0),
                output=LinearWeights(modules=(f"{_LAYER}.mlp.dense_4h_to_h",), shard_dim=1),
            ),
            attention_norm=f"{_LAYER}.input_layernorm",
            feed_forward_norm=f"{_LAYER}.post_attention_layernorm",
        ),
    ),
    final_norm="gpt_neox.final_layer_norm",
    lm_head=LinearWeights(modules=("embed_out",), shard_dim=0),
    aliases=(("embed_out.", "lm_head."),),
)


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError, UnsupportedModelError."""
    norm = NormSpec(kind="layer", eps=read_number(config, "layer_norm_eps", 1e-5, can_be_zero=True), has_bias=True)
    layer = LayerSpec(
        attention=_build_attention(config),
        feed_forward=MlpSpec(
            intermediate_size=require_size(config, "intermediate_size"),
            activation=parse_activation(config.get("hidden_act", "gelu")),
            is_gated=False,
            has_bias=True,
        ),
        norms=LayerNorms.alike("parallel" if config.get("use_parallel_residual", True) else "pre", norm),
    )
    return DecoderSpec(
        architecture="GPTNeoXForCausalLM",
        layers=(layer,) * require_size(config, "num_hidden_layers"),
        hidden_size=require_size(config, "hidden_size"),
        embedding_size=require_size(config, "hidden_size"),
        vocab_size=require_size(config, "vocab_size"),
        max_position_embeddings=scaled_context_len(config),
        final_norm=norm,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


def _build_attention(config: Mapping[str, Any]) -> AttentionSpec:
    num_heads, has_bias = require_size(config, "num_attention_heads"), config.get("attention_bias", True)
    head_dim = derived_head_dim(config)
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=build_rope_spec({"rotary_pct": 0.25} | dict(config), head_dim),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )


FAMILY = Family(build_spec=build_spec, build_weights=always(GPT_NEOX_WEIGHTS))
