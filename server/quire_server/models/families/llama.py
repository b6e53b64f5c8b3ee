"""Llama 1 to 3, and what is Llama under another name (Yi, SmolLM2); the layout that Mistral, Qwen 2 and Gemma share."""

from collections.abc import Mapping
from typing import Any

from quire_server.models.hf_config import head_dim_of, parse_activation, require
from quire_server.models.rope import build_rope_spec, scaled_context_len
from quire_server.models.spec import AttentionSpec, DecoderSpec, MlpSpec, NormSpec
from quire_server.models.weight_map import Family, LayerWeights, LinearWeights, WeightMap

LLAMA_LAYER = LayerWeights(
    attention_norm="model.layers.{layer}.input_layernorm",
    qkv=LinearWeights(
        modules=tuple(f"model.layers.{{layer}}.self_attn.{name}_proj" for name in "qkv"),
        shard_dim=0,
    ),
    attention_output=LinearWeights(modules=("model.layers.{layer}.self_attn.o_proj",), shard_dim=1),
    mlp_norm="model.layers.{layer}.post_attention_layernorm",
    mlp_input=LinearWeights(
        modules=("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"), shard_dim=0
    ),
    mlp_output=LinearWeights(modules=("model.layers.{layer}.mlp.down_proj",), shard_dim=1),
)
LLAMA_WEIGHTS = WeightMap(
    token_embedding="model.embed_tokens",
    layer=LLAMA_LAYER,
    final_norm="model.norm",
    lm_head=LinearWeights(modules=("lm_head",), shard_dim=0),
    aliases=(("model.", ""),),
)


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError, UnsupportedModelError."""
    num_layers, num_heads = require(config, "num_hidden_layers"), require(config, "num_attention_heads")
    head_dim = head_dim_of(config)
    has_attention_bias = bool(config.get("attention_bias", False))
    return DecoderSpec(
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        hidden_size=require(config, "hidden_size"),
        embedding_size=require(config, "hidden_size"),
        vocab_size=require(config, "vocab_size"),
        max_position_embeddings=scaled_context_len(config),
        norm=NormSpec(kind="rms", eps=config.get("rms_norm_eps", 1e-6)),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            has_qkv_bias=has_attention_bias,
            has_output_bias=has_attention_bias,
        ),
        mlp=MlpSpec(
            intermediate_size=require(config, "intermediate_size"),
            activation=parse_activation(config.get("hidden_act", "silu")),
            is_gated=True,
            has_bias=bool(config.get("mlp_bias", False)),
        ),
        rope=build_rope_spec(config, head_dim),
        sliding_windows=(None,) * num_layers,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


FAMILY = Family(build_spec=build_spec, weights=LLAMA_WEIGHTS)
