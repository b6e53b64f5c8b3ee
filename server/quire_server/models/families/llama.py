"""Llama 1 to 3, and what is Llama under another name (Yi, SmolLM2); the layout that Mistral, Qwen 2 and Gemma share."""

from collections.abc import Mapping, Sequence
from typing import Any

from quire_server.models.hf_config import head_dim_of, parse_activation, read_number, read_size, require_size
from quire_server.models.kinds.attention import AttentionSpec, AttentionWeights
from quire_server.models.kinds.mlp import MlpSpec, MlpWeights
from quire_server.models.planning.layout import LinearWeights
from quire_server.models.planning.parts import NormSpec
from quire_server.models.planning.spec import DecoderSpec, LayerNorms, LayerSpec
from quire_server.models.planning.weight_map import Family, LayerWeights, WeightMap, always
from quire_server.models.rope import build_rope_spec, scaled_context_len

_LAYER = "model.layers.{layer}"
LLAMA_ATTENTION = AttentionWeights(
    qkv=LinearWeights(modules=tuple(f"{_LAYER}.self_attn.{name}_proj" for name in "qkv"), shard_dim=0),
    output=LinearWeights(modules=(f"{_LAYER}.self_attn.o_proj",), shard_dim=1),
)
LLAMA_MLP = MlpWeights(
    input=LinearWeights(modules=(f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj"), shard_dim=0),
    output=LinearWeights(modules=(f"{_LAYER}.mlp.down_proj",), shard_dim=1),
)
LLAMA_LAYER = LayerWeights(
    attention=LLAMA_ATTENTION,
    feed_forward=LLAMA_MLP,
    attention_norm=f"{_LAYER}.input_layernorm",
    feed_forward_norm=f"{_LAYER}.post_attention_layernorm",
)
LLAMA_WEIGHTS = WeightMap(
    token_embedding="model.embed_tokens",
    layers=(LLAMA_LAYER,),
    final_norm="model.norm",
    lm_head=LinearWeights(modules=("lm_head",), shard_dim=0),
    aliases=(("model.", ""),),
)


def build_attention(config: Mapping[str, Any]) -> AttentionSpec:
    """Build the attention that all layers have alike. Raises CheckpointError, UnsupportedModelError."""
    num_heads, head_dim = require_size(config, "num_attention_heads"), head_dim_of(config)
    has_bias = bool(config.get("attention_bias", False))
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=read_size(config, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=build_rope_spec(config, head_dim),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )


def build_decoder(
    architecture: str, config: Mapping[str, Any], attentions: Sequence[AttentionSpec], norm_weight_offset: float = 0.0
) -> DecoderSpec:
    """Build a spec with one layer for each of `attentions`, all else alike. Raises CheckpointError."""
    norm = NormSpec(
        kind="rms", eps=read_number(config, "rms_norm_eps", 1e-6, can_be_zero=True), weight_offset=norm_weight_offset
    )
    norms = LayerNorms.alike("pre", norm)
    mlp = MlpSpec(
        intermediate_size=require_size(config, "intermediate_size"),
        activation=parse_activation(config.get("hidden_act", "silu")),
        is_gated=True,
        has_bias=bool(config.get("mlp_bias", False)),
    )
    return DecoderSpec(
        architecture=architecture,
        layers=tuple(LayerSpec(attention=attention, feed_forward=mlp, norms=norms) for attention in attentions),
        hidden_size=require_size(config, "hidden_size"),
        embedding_size=require_size(config, "hidden_size"),
        vocab_size=require_size(config, "vocab_size"),
        max_position_embeddings=scaled_context_len(config),
        final_norm=norm,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError, UnsupportedModelError."""
    num_layers = require_size(config, "num_hidden_layers")
    return build_decoder("LlamaForCausalLM", config, [build_attention(config)] * num_layers)


FAMILY = Family(build_spec=build_spec, build_weights=always(LLAMA_WEIGHTS))
