"""OPT: learned positions, layer norms, ReLU, biases. OPT-350m norms after each half and projects its embeddings."""

from collections.abc import Mapping
from typing import Any

from quire_server.models.hf_config import derived_head_dim, parse_activation, read_size, require_size
from quire_server.models.kinds.attention import AttentionSpec, AttentionWeights
from quire_server.models.kinds.mlp import MlpSpec, MlpWeights
from quire_server.models.planning.layout import LinearWeights
from quire_server.models.planning.parts import NormSpec
from quire_server.models.planning.spec import DecoderSpec, LayerNorms, LayerSpec, LearnedPositionsSpec
from quire_server.models.planning.weight_map import Family, LayerWeights, WeightMap, always
from quire_server.shared.errors import UnsupportedModelError

_POSITION_OFFSET = 2
_LAYER = "model.decoder.layers.{layer}"
OPT_WEIGHTS = WeightMap(
    token_embedding="model.decoder.embed_tokens",
    position_embedding="model.decoder.embed_positions",
    project_in=LinearWeights(modules=("model.decoder.project_in",), shard_dim=None),
    layers=(
        LayerWeights(
            attention=AttentionWeights(
                qkv=LinearWeights(modules=tuple(f"{_LAYER}.self_attn.{name}_proj" for name in "qkv"), shard_dim=0),
                output=LinearWeights(modules=(f"{_LAYER}.self_attn.out_proj",), shard_dim=1),
            ),
            feed_forward=MlpWeights(
                input=LinearWeights(modules=(f"{_LAYER}.fc1",), shard_dim=0),
                output=LinearWeights(modules=(f"{_LAYER}.fc2",), shard_dim=1),
            ),
            attention_norm=f"{_LAYER}.self_attn_layer_norm",
            feed_forward_norm=f"{_LAYER}.final_layer_norm",
        ),
    ),
    final_norm="model.decoder.final_layer_norm",
    project_out=LinearWeights(modules=("model.decoder.project_out",), shard_dim=None),
    lm_head=LinearWeights(modules=("lm_head",), shard_dim=0),
    aliases=(("model.decoder.", "decoder."),),
)


def build_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Build the spec. Raises CheckpointError, UnsupportedModelError."""
    hidden_size, max_position = require_size(config, "hidden_size"), require_size(config, "max_position_embeddings")
    is_pre_norm = config.get("do_layer_norm_before", True)
    if not config.get("layer_norm_elementwise_affine", True):
        raise UnsupportedModelError("OPT with layer_norm_elementwise_affine=false (Galactica) is not supported.")
    norm = NormSpec(kind="layer", eps=1e-5, has_bias=True)
    layer = _build_layer(config, LayerNorms.alike("pre" if is_pre_norm else "post", norm))
    return DecoderSpec(
        architecture="OPTForCausalLM",
        layers=(layer,) * require_size(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        embedding_size=read_size(config, "word_embed_proj_dim", hidden_size),
        vocab_size=require_size(config, "vocab_size"),
        max_position_embeddings=max_position,
        learned_positions=LearnedPositionsSpec(num_positions=max_position, offset=_POSITION_OFFSET),
        final_norm=norm if is_pre_norm and not config.get("_remove_final_layer_norm", False) else None,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
    )


def _build_layer(config: Mapping[str, Any], norms: LayerNorms) -> LayerSpec:
    num_heads, has_bias = require_size(config, "num_attention_heads"), config.get("enable_bias", True)
    head_dim = derived_head_dim(config)
    return LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
        ),
        feed_forward=MlpSpec(
            intermediate_size=require_size(config, "ffn_dim"),
            activation=parse_activation(config.get("activation_function", "relu")),
            is_gated=False,
            has_bias=has_bias,
        ),
        norms=norms,
    )


FAMILY = Family(build_spec=build_spec, build_weights=always(OPT_WEIGHTS))
