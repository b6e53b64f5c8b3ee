"""GPT-NeoX and Pythia: layer norms, partial rotation, parallel halves; query, key and value are stored per head."""

from collections.abc import Mapping
from typing import Any

from quire_server.models.hf_config import parse_activation, require
from quire_server.models.rope import build_rope_spec, scaled_context_len
from quire_server.models.spec import AttentionSpec, DecoderSpec, MlpSpec, NormSpec
from quire_server.models.weight_map import Family, LayerWeights, LinearWeights, WeightMap

_LAYER = "gpt_neox.layers.{layer}"
GPT_NEOX_WEIGHTS = WeightMap(
    token_embedding="gpt_neox.embed_in",
    layer=LayerWeights(
        attention_norm=f"{_LAYER}.input_layernorm",
        qkv=LinearWeights(modules=(f"{_LAYER}.attention.query_key_value",), shard_dim=0, row_order="per_head_qkv"),
        attention_output=LinearWeights(modules=(f"{_LAYER}.attention.dense",), shard_dim=1),
        mlp_norm=f"{_LAYER}.post_attention_layernorm",
        mlp_input=LinearWeights(modules=(f"{_LAYER}.mlp.dense_h_to_4h",), shard_dim=0),
        mlp_output=LinearWeights(modules=(f"{_LAYER}.mlp.dense_4h_to_h",), shard_dim=1),
    ),
    final_norm="gpt_neox.final_layer_norm",
    lm_head=LinearWeights(modules=("embed_out",), shard_dim=0),
    aliases=(("embed_out.", "lm_head."),),
)


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError, UnsupportedModelError."""
    hidden_size, num_heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    num_layers, head_dim = require(config, "num_hidden_layers"), hidden_size // num_heads
    has_attention_bias = config.get("attention_bias", True)
    return DecoderSpec(
        architecture="GPTNeoXForCausalLM",
        num_layers=num_layers,
        hidden_size=hidden_size,
        embedding_size=hidden_size,
        vocab_size=require(config, "vocab_size"),
        max_position_embeddings=scaled_context_len(config),
        norm=NormSpec(kind="layer", eps=config.get("layer_norm_eps", 1e-5), has_bias=True),
        is_parallel_residual=config.get("use_parallel_residual", True),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            has_qkv_bias=has_attention_bias,
            has_output_bias=has_attention_bias,
        ),
        mlp=MlpSpec(
            intermediate_size=require(config, "intermediate_size"),
            activation=parse_activation(config.get("hidden_act", "gelu")),
            is_gated=False,
            has_bias=True,
        ),
        rope=build_rope_spec({"rotary_pct": 0.25} | dict(config), head_dim),
        sliding_windows=(None,) * num_layers,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


FAMILY = Family(build_spec=build_spec, weights=GPT_NEOX_WEIGHTS)
