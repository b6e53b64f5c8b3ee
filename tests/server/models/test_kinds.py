"""Kinds of halves that the package does not know: planned, loaded and run from here, without a change to any file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire_contract.memory.model_shape import FitError
from quire_kernels import paged_attention, rope_and_cache
from quire_server.models.attention import KVCache, StepContext
from quire_server.models.families.llama import (
    LLAMA_ATTENTION,
    LLAMA_LAYER,
    LLAMA_MLP,
    LLAMA_WEIGHTS,
    build_attention,
    build_decoder,
)
from quire_server.models.families.qwen3 import FAMILY as QWEN3
from quire_server.models.footprint import read_model_shape
from quire_server.models.kinds.mlp import MlpPlan, MlpSpec, MlpWeights
from quire_server.models.modules import builder
from quire_server.models.modules.mlp import build_mlp
from quire_server.models.modules.part_builder import PartBuilder
from quire_server.models.planning.layout import LinearWeights, Segment
from quire_server.models.planning.linear_method import UnquantizedMethod
from quire_server.models.planning.parts import LinearPlan, Part, Planner
from quire_server.models.planning.plan import build_plan
from quire_server.models.planning.spec import KVShape
from quire_server.models.planning.weight_map import Family, always
from quire_server.models.reader import CheckpointReader
from quire_server.models.registry import FAMILIES
from quire_server.shared.errors import UnsupportedModelError
from quire_server.weights.checkpoint import open_checkpoint

FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SPECIFIED = FIELDS | {"vocab_size": 97}
LAYER = "model.layers.{layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsWeights:
    router: LinearWeights
    experts: tuple[MlpWeights, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsPlan:
    router: LinearPlan
    experts: tuple[MlpPlan, ...]
    num_used: int

    def parts(self) -> Iterator[Part]:
        yield self.router
        for expert in self.experts:
            yield from expert.parts()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    expert: MlpSpec
    num_used: int

    @property
    def activation_width(self) -> int:
        return self.num_used * self.expert.activation_width

    def plan(self, weights: ExpertsWeights, planner: Planner) -> ExpertsPlan:
        scores = Segment(name="experts", num_units=len(weights.experts))
        return ExpertsPlan(
            router=planner.linear(weights.router, outputs=(scores,), inputs=planner.hidden()),
            experts=tuple(self.expert.plan(expert, planner) for expert in weights.experts),
            num_used=self.num_used,
        )


def build_experts(plan: ExpertsPlan, parts: PartBuilder) -> Callable[[Tensor], Tensor]:
    router, experts = parts.linear(plan.router), [build_mlp(expert, parts) for expert in plan.experts]

    def run(hidden: Tensor) -> Tensor:
        shares, chosen = router(hidden, torch.float32).softmax(-1).topk(plan.num_used)
        weights = torch.zeros(len(hidden), len(experts)).scatter_(1, chosen, shares / shares.sum(-1, keepdim=True))
        return sum((weights[:, i : i + 1] * expert(hidden) for i, expert in enumerate(experts)), torch.zeros(()))

    return run


def expert_weights(number: int) -> MlpWeights:
    module = f"{LAYER}.mlp.experts.{number}"
    return MlpWeights(
        input=LinearWeights(modules=(f"{module}.gate_proj", f"{module}.up_proj"), shard_dim=0),
        output=LinearWeights(modules=(f"{module}.down_proj",), shard_dim=1),
    )


def test_a_kind_of_feed_forward_in_some_layers(
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Qwen 3 MoE with experts in every other layer: other sizes and other names than the dense layers between."""
    monkeypatch.setitem(builder.FEED_FORWARDS, ExpertsPlan, build_experts)
    fields = FIELDS | {"head_dim": 16, "decoder_sparse_step": 2, "norm_topk_prob": True}
    sizes = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    tiny = build_tiny_model("qwen3_moe", **fields, **sizes)

    config = SPECIFIED | {"head_dim": 16}
    expert = MlpSpec(intermediate_size=24, activation="silu", is_gated=True)
    spec = QWEN3.build_spec(config).map_layers(
        lambda index, layer: (
            replace(layer, feed_forward=ExpertsSpec(expert=expert, num_used=2)) if index == 1 else layer
        )
    )
    weights = QWEN3.build_weights(config)
    dense = weights.layer(0)
    experts = ExpertsWeights(
        router=LinearWeights(modules=(f"{LAYER}.mlp.gate",), shard_dim=None),
        experts=tuple(expert_weights(number) for number in range(4)),
    )
    weights = replace(weights, layers=(dense, replace(dense, feed_forward=experts), dense))
    model = tiny.load_as(spec, weights)
    expected = tiny.reference_logits(prompt_of(40))
    torch.testing.assert_close(harness(model).prefill(prompt_of(40)), expected, atol=1e-4, rtol=1e-4)
    assert model.num_parameter_bytes == 4 * sum(parameter.numel() for parameter in tiny.reference.parameters())


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanWeights:
    value: LinearWeights
    output: LinearWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanPlan:
    spec: "MeanSpec"
    value: LinearPlan
    output: LinearPlan

    def parts(self) -> Iterator[Part]:
        yield self.value
        yield self.output


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanSpec:
    """The mean of all values so far."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: None = None
    sliding_window: None = None

    @property
    def kv_shape(self) -> KVShape:
        return KVShape(num_kv_heads=self.num_kv_heads, key_dim=self.head_dim, value_dim=self.head_dim)

    @property
    def activation_width(self) -> int:
        return self.num_heads * self.head_dim

    def plan(self, weights: MeanWeights, planner: Planner) -> MeanPlan:
        heads = Segment(name="heads", num_units=self.num_heads, unit_size=self.head_dim)
        values = Segment(name="KV heads", num_units=self.num_kv_heads, unit_size=self.head_dim)
        return MeanPlan(
            spec=self,
            value=planner.linear(weights.value, outputs=(values,), inputs=planner.hidden()),
            output=planner.linear(weights.output, outputs=(planner.hidden(),), inputs=heads),
        )


def build_mean(plan: MeanPlan, parts: PartBuilder) -> Callable[[Tensor, StepContext, KVCache], Tensor]:
    project, output, spec = parts.linear(plan.value), parts.linear(plan.output), plan.spec

    def run(hidden: Tensor, step: StepContext, kv_cache: KVCache) -> Tensor:
        value = project(hidden).view(-1, spec.num_kv_heads, spec.head_dim)
        query, at = hidden.new_zeros(len(hidden), spec.num_heads, spec.head_dim), step.metadata
        rope_and_cache(query, torch.zeros_like(value), value, None, None, *kv_cache, at.slot_mapping)
        mean = paged_attention(query, *kv_cache, at.block_table, at.query_start_loc, at.seq_lens, scale=1.0)
        return output(mean.flatten(1))

    return run


def test_a_kind_of_attention(
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Llama whose queries in one layer are zero: `transformers` has all of its tensors, we have two of four."""
    monkeypatch.setitem(builder.ATTENTIONS, MeanPlan, build_mean)
    tiny = build_tiny_model("llama", **FIELDS)
    with torch.no_grad():
        tiny.reference.model.layers[1].self_attn.q_proj.weight.zero_()
    attention = build_attention(SPECIFIED)
    spec = build_decoder("Toy", SPECIFIED, [attention] * 3)
    mean = MeanSpec(num_heads=4, num_kv_heads=2, head_dim=16)
    spec = spec.map_layers(lambda index, layer: replace(layer, attention=mean) if index == 1 else layer)
    names = MeanWeights(
        value=LinearWeights(modules=(f"{LAYER}.self_attn.v_proj",), shard_dim=0), output=LLAMA_ATTENTION.output
    )
    weights = replace(LLAMA_WEIGHTS, layers=(LLAMA_LAYER, replace(LLAMA_LAYER, attention=names), LLAMA_LAYER))
    model = tiny.load_as(spec, weights)
    expected = tiny.reference_logits(prompt_of(40))
    torch.testing.assert_close(harness(model).prefill(prompt_of(40), chunk=7), expected, atol=1e-4, rtol=1e-4)


def test_layers_with_different_numbers_of_kv_heads(
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
    rewrite_tensors: Callable[..., None],
) -> None:
    """As DeciLM has them. `transformers` computes the same with every shared head written out."""
    tiny = build_tiny_model("llama", **FIELDS | {"num_key_value_heads": 4})
    num_kv_heads = [4, 2, 1]

    def share(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer, count in enumerate(num_kv_heads):
            for name in ("k_proj", "v_proj"):
                module = getattr(tiny.reference.model.layers[layer].self_attn, name)
                kept = module.weight.detach().view(4, 16, 64)[:: 4 // count]
                with torch.no_grad():
                    module.weight.copy_(kept.repeat_interleave(4 // count, 0).reshape(64, 64))
                tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = kept.reshape(-1, 64).contiguous()
        return tensors

    rewrite_tensors(tiny, share)
    attention = build_attention(SPECIFIED)
    spec = build_decoder("Toy", SPECIFIED, [replace(attention, num_kv_heads=count) for count in num_kv_heads])
    model = tiny.load_as(spec, LLAMA_WEIGHTS)
    expected = tiny.reference_logits(prompt_of(40))
    torch.testing.assert_close(harness(model).prefill(prompt_of(40), chunk=7), expected, atol=1e-4, rtol=1e-4)


def test_attention_sinks_are_refused_before_anything_is_read(
    build_tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before anything is counted: the download Job calls no model loadable that the server refuses."""
    fields = FIELDS | {"head_dim": 16, "num_local_experts": 2, "attention_bias": True}
    tiny = build_tiny_model("gpt_oss", **fields)
    attention = replace(build_attention(SPECIFIED), has_sinks=True, has_qkv_bias=True, has_output_bias=True)
    spec = build_decoder("Toy", SPECIFIED, [attention] * 3)
    spec = spec.map_layers(lambda _, layer: replace(layer, feed_forward=NoFeedForward()))
    sinks = replace(LLAMA_ATTENTION, sinks=f"{LAYER}.self_attn.sinks")
    weights = replace(LLAMA_WEIGHTS, layers=(replace(LLAMA_LAYER, attention=sinks, feed_forward=LLAMA_MLP),))
    with pytest.raises(UnsupportedModelError, match=r"layers\.\d\.self_attn\.q_proj: attention sinks .*\.sinks"):
        build_plan(spec, weights, lambda *_: UnquantizedMethod())
    family = Family(build_spec=lambda config: spec, build_weights=always(weights))
    monkeypatch.setitem(FAMILIES, "GptOssForCausalLM", family)
    with pytest.raises(FitError, match=r"layers\.0\.self_attn\.q_proj: attention sinks .*\.sinks"):
        read_model_shape(open_checkpoint(tiny.path))
    monkeypatch.setattr(CheckpointReader, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UnsupportedModelError, match="attention sinks"):
        tiny.load()


@dataclass(frozen=True, slots=True)
class NoFeedForward:
    """Reads nothing: gpt-oss has experts, which are not what the test is about."""

    activation_width: int = 0

    def parts(self) -> Iterator[Part]:
        return iter(())

    def plan(self, weights: object, planner: Planner) -> "NoFeedForward":
        return self
