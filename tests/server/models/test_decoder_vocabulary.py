"""What a spec and a weight map can say beyond today's families, against `transformers`.

Each case reads a tiny checkpoint of an architecture that has no family here, by a spec and names of the test's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from quire_server.models.families.llama import (
    LLAMA_ATTENTION,
    LLAMA_LAYER,
    LLAMA_MLP,
    LLAMA_WEIGHTS,
    build_attention,
    build_decoder,
)
from quire_server.models.kinds.attention import AttentionSpec, AttentionWeights
from quire_server.models.kinds.mlp import MlpSpec, MlpWeights
from quire_server.models.planning.layout import LinearWeights
from quire_server.models.planning.parts import NormSpec
from quire_server.models.planning.spec import (
    DecoderSpec,
    LayerNorms,
    LayerSpec,
    LearnedPositionsSpec,
    NormPlacement,
    RopeSpec,
)
from quire_server.models.planning.weight_map import LayerWeights, WeightMap
from quire_server.models.rope import build_rope_spec

Config = dict[str, Any]
HIDDEN, HEADS, HEAD_DIM, INNER, VOCAB, POSITIONS = 64, 4, 16, 96, 97, 256
NEW = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
SPECIFIED = NEW | {"vocab_size": VOCAB}
OLD = {"n_embd": HIDDEN, "n_layer": 3, "n_head": HEADS, "n_positions": POSITIONS, "n_inner": INNER}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
PLAIN_LAYER_NORM = NormSpec(kind="layer", eps=1e-5)
LAYER_NORM = replace(PLAIN_LAYER_NORM, has_bias=True)
LLAMA = "model.layers.{layer}"


@dataclass(frozen=True, kw_only=True)
class Case:
    model_type: str
    fields: Config
    spec: DecoderSpec
    weights: WeightMap


def rope(theta: float = 10000.0, partial: float = 1.0, *, is_interleaved: bool = False) -> RopeSpec:
    config = {"rope_theta": theta, "partial_rotary_factor": partial, "max_position_embeddings": POSITIONS}
    return replace(build_rope_spec(config, HEAD_DIM), is_interleaved=is_interleaved)


def attention(num_kv_heads: int = HEADS, **fields: Any) -> AttentionSpec:
    return AttentionSpec(num_heads=HEADS, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5, **fields)


def plain_mlp(activation: Any, *, has_bias: bool = True) -> MlpSpec:
    return MlpSpec(intermediate_size=INNER, activation=activation, is_gated=False, has_bias=has_bias)


def decoder(layers: list[LayerSpec], final_norm: NormSpec, **fields: Any) -> DecoderSpec:
    sizes: Config = {"hidden_size": HIDDEN, "embedding_size": HIDDEN, "vocab_size": VOCAB}
    sizes |= {"max_position_embeddings": POSITIONS, "architecture": "Toy"}
    return DecoderSpec(layers=tuple(layers), final_norm=final_norm, **sizes, **fields)


def linear(*modules: str, shard_dim: Any = 0, **fields: Any) -> LinearWeights:
    return LinearWeights(modules=modules, shard_dim=shard_dim, **fields)


def llama_like(attentions: list[AttentionSpec], norms: LayerNorms, final_norm: NormSpec, **fields: Any) -> DecoderSpec:
    spec = build_decoder("Toy", SPECIFIED | {"tie_word_embeddings": fields.pop("is_tied", False)}, attentions)
    spec = spec.map_layers(lambda _, layer: replace(layer, norms=norms))
    return replace(spec, final_norm=final_norm, **fields)


def llama_names(**fields: Any) -> WeightMap:
    return replace(LLAMA_WEIGHTS, layers=(replace(LLAMA_LAYER, **fields),))


def gptj() -> Case:
    layer = LayerSpec(
        attention=attention(rope=rope(partial=0.5, is_interleaved=True)),
        feed_forward=plain_mlp("gelu_tanh"),
        norms=LayerNorms.alike("parallel_shared", LAYER_NORM),
    )
    name = "transformer.h.{layer}"
    weights = WeightMap(
        token_embedding="transformer.wte",
        layers=(
            LayerWeights(
                attention=AttentionWeights(
                    qkv=linear(*(f"{name}.attn.{each}_proj" for each in "qkv")),
                    output=linear(f"{name}.attn.out_proj", shard_dim=1),
                ),
                feed_forward=MlpWeights(
                    input=linear(f"{name}.mlp.fc_in"), output=linear(f"{name}.mlp.fc_out", shard_dim=1)
                ),
                attention_norm=f"{name}.ln_1",
            ),
        ),
        final_norm="transformer.ln_f",
        lm_head=linear("lm_head"),
    )
    spec = decoder([layer] * 3, LAYER_NORM, has_lm_head_bias=True)
    return Case(model_type="gptj", fields=OLD | {"rotary_dim": HEAD_DIM // 2}, spec=spec, weights=weights)


def gpt2_names(*, is_transposed: bool, layout: Any) -> WeightMap:
    name = "transformer.h.{layer}"
    return WeightMap(
        token_embedding="transformer.wte",
        position_embedding="transformer.wpe",
        layers=(
            LayerWeights(
                attention=AttentionWeights(
                    qkv=linear(f"{name}.attn.c_attn", is_transposed=is_transposed, layout=layout),
                    output=linear(f"{name}.attn.c_proj", shard_dim=1, is_transposed=is_transposed),
                ),
                feed_forward=MlpWeights(
                    input=linear(f"{name}.mlp.c_fc", is_transposed=is_transposed),
                    output=linear(f"{name}.mlp.c_proj", shard_dim=1, is_transposed=is_transposed),
                ),
                attention_norm=f"{name}.ln_1",
                feed_forward_norm=f"{name}.ln_2",
            ),
        ),
        final_norm="transformer.ln_f",
        lm_head=linear("lm_head"),
    )


def gpt2_spec(num_kv_heads: int) -> DecoderSpec:
    layer = LayerSpec(
        attention=attention(num_kv_heads, has_qkv_bias=True, has_output_bias=True),
        feed_forward=plain_mlp("gelu_tanh"),
        norms=LayerNorms.alike("pre", LAYER_NORM),
    )
    positions = LearnedPositionsSpec(num_positions=POSITIONS)
    return decoder([layer] * 3, LAYER_NORM, learned_positions=positions, tie_word_embeddings=True)


def gpt2() -> Case:
    names = gpt2_names(is_transposed=True, layout="stacked")
    return Case(model_type="gpt2", fields=OLD, spec=gpt2_spec(HEADS), weights=names)


def bigcode(*, is_multi_query: bool) -> Case:
    names = gpt2_names(is_transposed=False, layout="stacked" if is_multi_query else "grouped")
    spec = gpt2_spec(1 if is_multi_query else HEADS)
    return Case(model_type="gpt_bigcode", fields=OLD | {"multi_query": is_multi_query}, spec=spec, weights=names)


def falcon(*, is_new: bool) -> Case:
    placement: NormPlacement = "parallel" if is_new else "parallel_shared"
    layer = LayerSpec(
        attention=attention(2 if is_new else 1, rope=rope()),
        feed_forward=plain_mlp("gelu", has_bias=False),
        norms=LayerNorms.alike(placement, LAYER_NORM),
    )
    name = "transformer.h.{layer}"
    weights = WeightMap(
        token_embedding="transformer.word_embeddings",
        layers=(
            LayerWeights(
                attention=AttentionWeights(
                    qkv=linear(f"{name}.self_attention.query_key_value", layout="grouped"),
                    output=linear(f"{name}.self_attention.dense", shard_dim=1),
                ),
                feed_forward=MlpWeights(
                    input=linear(f"{name}.mlp.dense_h_to_4h"),
                    output=linear(f"{name}.mlp.dense_4h_to_h", shard_dim=1),
                ),
                attention_norm=f"{name}.ln_attn" if is_new else f"{name}.input_layernorm",
                feed_forward_norm=f"{name}.ln_mlp" if is_new else None,
            ),
        ),
        final_norm="transformer.ln_f",
        lm_head=linear("lm_head"),
    )
    fields = {key: value for key, value in NEW.items() if key not in ("intermediate_size", "num_key_value_heads")}
    fields |= {"ffn_hidden_size": INNER, "num_kv_heads": 2, "new_decoder_architecture": is_new, "alibi": False}
    spec = decoder([layer] * 3, LAYER_NORM, tie_word_embeddings=True)
    return Case(model_type="falcon", fields=fields, spec=spec, weights=weights)


def phi3() -> Case:
    spec = build_decoder("Toy", SPECIFIED, [attention(2, rope=rope(), sliding_window=8)] * 3)
    names = llama_names(
        attention=replace(LLAMA_ATTENTION, qkv=linear(f"{LLAMA}.self_attn.qkv_proj")),
        feed_forward=replace(LLAMA_MLP, input=linear(f"{LLAMA}.mlp.gate_up_proj")),
    )
    fields = NEW | {"sliding_window": 8, "rms_norm_eps": 1e-6}
    return Case(model_type="phi3", fields=fields, spec=spec, weights=names)


def cohere2() -> Case:
    interleaved = rope(is_interleaved=True)
    layers = [
        attention(2, rope=interleaved, sliding_window=8) if kind == "sliding_attention" else attention(2)
        for kind in TYPES
    ]
    norms = LayerNorms.alike("parallel_shared", PLAIN_LAYER_NORM)
    spec = llama_like(layers, norms, PLAIN_LAYER_NORM, logit_scale=0.25, is_tied=True)
    fields = NEW | {"sliding_window": 8, "layer_types": TYPES, "logit_scale": 0.25}
    names = llama_names(feed_forward_norm=None)
    return Case(model_type="cohere2", fields=fields, spec=spec, weights=names)


def olmo() -> Case:
    weightless = replace(PLAIN_LAYER_NORM, has_weight=False)
    spec = llama_like([build_attention(NEW)] * 3, LayerNorms.alike("pre", weightless), weightless)
    names = replace(llama_names(attention_norm=None, feed_forward_norm=None), final_norm=None)
    return Case(model_type="olmo", fields=NEW, spec=spec, weights=names)


def olmo2() -> Case:
    norm = NormSpec(kind="rms", eps=1e-5)
    each = replace(build_attention(NEW), qk_norm=norm, qk_norm_scope="projection")
    names = llama_names(
        attention=replace(
            LLAMA_ATTENTION, query_norm=f"{LLAMA}.self_attn.q_norm", key_norm=f"{LLAMA}.self_attn.k_norm"
        ),
        attention_norm=None,
        attention_output_norm=f"{LLAMA}.post_attention_layernorm",
        feed_forward_norm=None,
        feed_forward_output_norm=f"{LLAMA}.post_feedforward_layernorm",
    )
    spec = llama_like([each] * 3, LayerNorms.alike("output", norm), norm)
    return Case(model_type="olmo2", fields=NEW, spec=spec, weights=names)


def gemma3() -> Case:
    norm = NormSpec(kind="rms", eps=1e-6, weight_offset=1.0)
    each = replace(attention(2, qk_norm=norm), scale=24**-0.5)
    layers = [
        replace(each, rope=rope(100.0), sliding_window=8) if kind == "sliding_attention" else replace(each, rope=rope())
        for kind in TYPES
    ]
    spec = llama_like(layers, LayerNorms.alike("sandwich", norm), norm, embedding_scale=HIDDEN**0.5, is_tied=True)
    gelu = MlpSpec(intermediate_size=INNER, activation="gelu_tanh", is_gated=True)
    names = llama_names(
        attention=replace(
            LLAMA_ATTENTION, query_norm=f"{LLAMA}.self_attn.q_norm", key_norm=f"{LLAMA}.self_attn.k_norm"
        ),
        attention_output_norm=f"{LLAMA}.post_attention_layernorm",
        feed_forward_norm=f"{LLAMA}.pre_feedforward_layernorm",
        feed_forward_output_norm=f"{LLAMA}.post_feedforward_layernorm",
    )
    ropes = {"sliding_attention": {"rope_theta": 100.0}, "full_attention": {"rope_theta": 10000.0}}
    parameters = {kind: {"rope_type": "default"} | each for kind, each in ropes.items()}
    fields = NEW | {"head_dim": HEAD_DIM, "sliding_window": 8, "layer_types": TYPES, "query_pre_attn_scalar": 24}
    return Case(
        model_type="gemma3_text",
        fields=fields | {"rope_parameters": parameters},
        spec=spec.map_layers(lambda _, layer: replace(layer, feed_forward=gelu)),
        weights=names,
    )


def smollm3() -> Case:
    layers = [attention(2, rope=rope()), attention(2), attention(2, rope=rope())]
    spec = build_decoder("Toy", SPECIFIED | {"tie_word_embeddings": True}, layers)
    rotation = {"rope_type": "default", "rope_theta": 10000.0}
    fields = NEW | {"no_rope_layers": [1, 0, 1], "rope_parameters": rotation}
    return Case(model_type="smollm3", fields=fields, spec=spec, weights=LLAMA_WEIGHTS)


CASES = {
    "shared-norm, rotated in neighbouring pairs, head bias (GPT-J)": gptj,
    "transposed, fused (GPT-2)": gpt2,
    "fused, one head of key and value (BigCode)": lambda: bigcode(is_multi_query=True),
    "fused by head (BigCode)": lambda: bigcode(is_multi_query=False),
    "fused by group, two norms (Falcon 40B)": lambda: falcon(is_new=True),
    "fused, one group, shared norm (Falcon 7B)": lambda: falcon(is_new=False),
    "fused segments of different sizes (Phi-3)": phi3,
    "shared norm, windows with positions, full without, scaled logits (Cohere 2)": cohere2,
    "weightless norms (OLMo)": olmo,
    "output norms, norms over all heads (OLMo 2)": olmo2,
    "two ropes (Gemma 3)": gemma3,
    "a layer without positions (SmolLM3)": smollm3,
}


@pytest.mark.parametrize("build_case", CASES.values(), ids=CASES)
def test_logits_and_greedy_answers_are_those_of_transformers(
    build_case: Callable[[], Case],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
) -> None:
    case = build_case()
    tiny = build_tiny_model(case.model_type, **case.fields)
    model = tiny.load_as(case.spec, case.weights)
    expected = tiny.reference_logits(prompt_of(40))
    torch.testing.assert_close(harness(model).prefill(prompt_of(40)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(harness(model).prefill(prompt_of(40), chunk=7), expected, atol=1e-4, rtol=1e-4)
    prompts = [prompt_of(length) for length in (5, 23)]
    assert harness(model).greedy(prompts, 16) == [tiny.reference_greedy(prompt, 16) for prompt in prompts]
