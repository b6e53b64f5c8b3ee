"""Slices of ranks: joined they are the whole, whatever the layout; what does not divide is refused by name."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quire_server.models.attention import AttentionMetadata, KVCache, StepContext
from quire_server.models.families.llama import build_attention as build_attention_spec
from quire_server.models.families.llama import build_decoder
from quire_server.models.modules.attention import build_attention
from quire_server.models.modules.linear import take
from quire_server.models.modules.mlp import build_mlp
from quire_server.models.modules.part_builder import PartBuilder
from quire_server.models.modules.rope_table import RopeTables
from quire_server.models.planning.layout import LinearWeights, Segment, module_layouts
from quire_server.models.planning.linear_method import UnquantizedMethod
from quire_server.models.planning.parts import LinearPlan, Planner, nothing_stored
from quire_server.models.planning.plan import ModelPlan
from quire_server.models.planning.sharding import WHOLE, ModelShare, loaded_bytes, shard_module
from quire_server.models.reader import CheckpointReader
from quire_server.models.registry import plan_model
from quire_server.shared.errors import CheckpointError, UnsupportedModelError
from quire_server.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
LLAMA = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
MODELS = [
    pytest.param("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}, id="biases"),
    pytest.param("qwen3", LLAMA | {"head_dim": 24}, id="head-norms"),
    pytest.param("gpt_neox", SIZES | {"intermediate_size": 96}, id="fused-by-head"),
    pytest.param("opt", SIZES | {"ffn_dim": 96}, id="opt"),
]


def plan_linear(weights: LinearWeights, outputs: tuple[Segment, ...], inputs: Segment, has_bias: bool) -> LinearPlan:
    planner = Planner(hidden_size=1, method_for=lambda name, stored: UnquantizedMethod(), stored=nothing_stored)
    return planner.linear(weights, outputs=outputs, inputs=inputs, has_bias=has_bias)


def store(segments: Sequence[Segment], rows: Sequence[Tensor], weights: LinearWeights) -> list[Tensor]:
    """Lay segments out as a checkpoint has them, head by head: the definition of the layouts, written out."""
    if len(weights.modules) > 1:
        modules = list(rows)
    elif weights.layout == "stacked":
        modules = [torch.cat(list(rows))]
    else:
        heads = [list(part.split(segment.unit_size)) for part, segment in zip(rows, segments, strict=True)]
        num_groups = min(len(each) for each in heads)
        stored: list[Tensor] = []
        for _ in range(num_groups):
            for each, segment in zip(heads, segments, strict=True):
                stored += [each.pop(0) for _ in range(segment.num_units // num_groups)]
        modules = [torch.cat(stored)]
    return [module.t() if weights.is_transposed and module.dim() == 2 else module for module in modules]


def labelled(segments: Sequence[Segment], in_features: int) -> list[Tensor]:
    sizes = [segment.size for segment in segments]
    return list(torch.arange(sum(sizes) * in_features).view(-1, in_features).split(sizes))


@st.composite
def fused(draw: st.DrawFn) -> tuple[LinearWeights, tuple[Segment, ...], int]:
    num_kv_heads, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    head_dim, world_size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    if num_kv_heads % world_size and world_size % num_kv_heads:
        world_size = num_kv_heads
    multiple = world_size // num_kv_heads if world_size > num_kv_heads else 1
    pairs = Segment(name="KV heads", num_units=num_kv_heads, unit_size=head_dim, can_replicate=True)
    queries = Segment(name="heads", num_units=num_kv_heads * per_group * multiple, unit_size=head_dim)
    modules = draw(st.sampled_from([("m",), ("q", "k", "v")]))
    weights = LinearWeights(
        modules=modules,
        shard_dim=0,
        layout=draw(st.sampled_from(["stacked", "grouped"])),
        is_transposed=draw(st.booleans()),
    )
    return weights, (queries, pairs, pairs), world_size


@given(fused(), st.booleans())
def test_rows_of_all_ranks_are_the_whole(case: tuple[LinearWeights, tuple[Segment, ...], int], has_bias: bool) -> None:
    weights, segments, world_size = case
    rows, bias = labelled(segments, 5), [each[:, 0] for each in labelled(segments, 5)]
    plan = plan_linear(weights, segments, Segment(name="hidden features", num_units=5), has_bias)
    for ours, in_checkpoint in ((rows, store(segments, rows, weights)), (bias, store(segments, bias, weights))):
        heads_per_rank = [max(segment.num_units // world_size, 1) * segment.unit_size for segment in segments]
        for rank in range(world_size):
            share = ModelShare(rank=rank, world_size=world_size)
            shards = [shard_module(plan, module, share) for module in plan.modules]
            assert all(shard.has_bias is has_bias for shard in shards)
            got = torch.cat([take(*each) for each in zip(in_checkpoint, plan.modules, shards, strict=True)])
            # Key and value are the heads that this rank's queries look at, also where ranks outnumber them.
            starts = [rank * size for size in heads_per_rank[:1]]
            starts += [segments[1].size * rank // world_size // segments[1].unit_size * segments[1].unit_size] * 2
            expected = [part[at : at + size] for part, at, size in zip(ours, starts, heads_per_rank, strict=True)]
            assert torch.equal(got, torch.cat(expected))


@given(st.integers(1, 4), st.integers(1, 6), st.booleans(), st.booleans())
def test_columns_of_all_ranks_are_the_whole(
    world_size: int, per_rank: int, is_transposed: bool, has_bias: bool
) -> None:
    inputs = Segment(name="heads", num_units=world_size * per_rank, unit_size=2)
    outputs = (Segment(name="hidden features", num_units=3),)
    weights = LinearWeights(modules=("m",), shard_dim=1, is_transposed=is_transposed)
    plan = plan_linear(weights, outputs, inputs, has_bias)
    whole = torch.arange(3 * inputs.size).view(3, -1)
    stored = whole.t() if is_transposed else whole
    shards = [
        shard_module(plan, plan.modules[0], ModelShare(rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert torch.equal(torch.cat([take(stored, plan.modules[0], shard) for shard in shards], dim=1), whole)
    assert [shard.has_bias for shard in shards] == [has_bias] + [False] * (world_size - 1)


def test_what_is_whole_on_disk_is_not_copied() -> None:
    segments = (Segment(name="heads", num_units=2, unit_size=3),)
    plan = plan_linear(LinearWeights(modules=("m",), shard_dim=0), segments, Segment(name="in", num_units=4), False)
    stored = torch.zeros(6, 4)
    assert take(stored, plan.modules[0], shard_module(plan, plan.modules[0], WHOLE)).data_ptr() == stored.data_ptr()


@pytest.mark.parametrize(
    ("shard_dim", "message"),
    [(0, r"m\.proj: 3 KV heads cannot be divided among 2 devices"), (1, r"m\.proj: 5 features cannot be divided")],
)
def test_what_does_not_divide_is_refused_by_name(shard_dim: Any, message: str) -> None:
    pairs = Segment(name="KV heads", num_units=3, unit_size=2, can_replicate=True)
    weights = LinearWeights(modules=("m.proj",), shard_dim=shard_dim)
    plan = plan_linear(weights, (pairs,), Segment(name="features", num_units=5), False)
    with pytest.raises(UnsupportedModelError, match=message):
        shard_module(plan, plan.modules[0], ModelShare(rank=0, world_size=2))


def test_layouts_that_do_not_come_out_are_refused() -> None:
    two, three = Segment(name="a", num_units=2), Segment(name="b", num_units=3)
    with pytest.raises(ValueError, match="neither one module nor one for each of 3"):
        module_layouts(LinearWeights(modules=("x", "y"), shard_dim=0), (two, two, three))
    with pytest.raises(CheckpointError, match="x: 3 b do not make 2 groups"):
        module_layouts(LinearWeights(modules=("x",), shard_dim=0, layout="grouped"), (two, three))
    with pytest.raises(ValueError, match="rank 2 is none of 2"):
        ModelShare(rank=2, world_size=2)


class Parts:
    """Attention and feed-forward of one layer, as each rank builds them."""

    def __init__(self, tiny: Any) -> None:
        checkpoint = open_checkpoint(tiny.path)
        self.plan: ModelPlan = plan_model(checkpoint.config)
        aliases = self.plan.weights.aliases
        self.reader = CheckpointReader(checkpoint, aliases, torch.float32, CPU)

    def attend(self, hidden: Tensor, share: ModelShare) -> Tensor:
        spec, plan, num_tokens = self.plan.spec, self.plan.layers[1].attention, len(hidden)
        ropes = RopeTables(spec.ropes, 64, CPU)
        attention = build_attention(plan, PartBuilder(self.reader, share, spec.ropes))
        kept = spec.layers[1].attention.kv_shape
        shape = (2, num_tokens, max(kept.num_kv_heads // share.world_size, 1), kept.key_dim)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
            seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
            block_table=torch.tensor([[1]], dtype=torch.int32),
            slot_mapping=torch.arange(num_tokens, 2 * num_tokens),
        )
        step = StepContext(torch.arange(num_tokens), ropes.grow(num_tokens), metadata)
        return attention(hidden, step, KVCache(torch.zeros(shape), torch.zeros(shape)))

    def feed_forward(self, hidden: Tensor, share: ModelShare) -> Tensor:
        return build_mlp(self.plan.layers[1].feed_forward, PartBuilder(self.reader, share, self.plan.spec.ropes))(
            hidden
        )


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("model_type", "fields"), MODELS)
def test_partial_results_of_all_ranks_add_up(
    model_type: str, fields: dict[str, Any], world_size: int, build_tiny_model: Callable[..., Any]
) -> None:
    parts = Parts(build_tiny_model(model_type, **fields))
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    shares = [ModelShare(rank=rank, world_size=world_size) for rank in range(world_size)]
    for run in (parts.attend, parts.feed_forward):
        whole = run(hidden, WHOLE)
        joined = sum((run(hidden, share) for share in shares), torch.zeros_like(whole))
        torch.testing.assert_close(joined, whole, atol=1e-4, rtol=1e-4)


def test_alibi_slopes_are_dealt_out_with_the_heads(build_tiny_model: Callable[..., Any]) -> None:
    tiny = build_tiny_model("llama", **LLAMA)
    parts = Parts(tiny)
    attention = replace(build_attention_spec(LLAMA), rope=None, is_alibi=True)
    spec = build_decoder("Toy", LLAMA | {"vocab_size": 97}, [attention] * 3)
    whole_plan = parts.plan
    parts.plan = replace(
        whole_plan,
        spec=spec,
        layers=tuple(replace(each, attention=replace(each.attention, spec=attention)) for each in whole_plan.layers),  # type: ignore[type-var]
    )
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    joined = sum((parts.attend(hidden, ModelShare(rank=rank, world_size=2)) for rank in range(2)), torch.zeros(9, 64))
    torch.testing.assert_close(joined, parts.attend(hidden, WHOLE), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_tied", [False, True])
def test_vocabulary_is_dealt_out(is_tied: bool, build_tiny_model: Callable[..., Any]) -> None:
    """Embeddings of the ranks add up, their logits lie side by side, and each holds what is foretold."""
    tiny = build_tiny_model("llama", **LLAMA | {"tie_word_embeddings": is_tied, "vocab_size": 98})
    ids, hidden = torch.tensor([0, 97, 48, 49]), torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    ranks = [tiny.load(share=ModelShare(rank=rank, world_size=2)) for rank in range(2)]
    embedded = tiny.reference.model.embed_tokens(ids)
    torch.testing.assert_close(sum(rank.embed_tokens(ids) for rank in ranks), embedded)
    logits = torch.cat([rank.compute_logits(hidden) for rank in ranks], dim=1)
    torch.testing.assert_close(logits, tiny.reference.lm_head(hidden), atol=1e-4, rtol=1e-4)
    plan = plan_model(open_checkpoint(tiny.path).config)
    for rank in ranks:
        foretold = sum(loaded_bytes(placed.tensor, 4, rank.share) for placed in plan.tensors())
        assert rank.num_parameter_bytes == foretold
    whole = sum(parameter.numel() for parameter in tiny.reference.parameters())
    num_norms = 7 * 64
    assert sum(rank.num_parameter_bytes for rank in ranks) == 4 * (whole + num_norms)


def test_a_model_that_does_not_divide_is_refused_before_anything_is_read(
    build_tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = build_tiny_model("llama", **LLAMA | {"vocab_size": 96})
    monkeypatch.setattr("quire_server.models.reader.read_tensor", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.self_attn\.q_proj\.weight: 4 heads .* among 3 devices"
    ):
        tiny.load(share=ModelShare(rank=0, world_size=3))


def test_a_norm_over_all_heads_is_not_divided(build_tiny_model: Callable[..., Any]) -> None:
    tiny = build_tiny_model("qwen3", **LLAMA | {"head_dim": 24})
    parts = Parts(tiny)
    attention = replace(parts.plan.layers[1].attention)  # type: ignore[type-var]
    attention = replace(attention, spec=replace(attention.spec, qk_norm_scope="projection"))
    with pytest.raises(UnsupportedModelError, match="q_norm: a norm over all heads cannot be divided"):
        build_attention(attention, PartBuilder(parts.reader, ModelShare(rank=1, world_size=2), parts.plan.spec.ropes))


STAGED = [
    pytest.param("llama", LLAMA, id="untied"),
    pytest.param("gemma2", LLAMA | {"head_dim": 16, "sliding_window": 8}, id="tied"),
    pytest.param("opt", SIZES | {"ffn_dim": 96}, id="learned-positions"),
    pytest.param(
        "opt", SIZES | {"ffn_dim": 96, "do_layer_norm_before": False, "word_embed_proj_dim": 32}, id="projected"
    ),
]


@pytest.mark.parametrize("bounds", [(0, 1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize(("model_type", "fields"), STAGED)
def test_stages_one_after_the_other_are_the_model(
    model_type: str,
    fields: dict[str, Any],
    bounds: tuple[int, ...],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
) -> None:
    tiny = build_tiny_model(model_type, **fields)
    stages = [tiny.load(share=ModelShare(layers=range(*each))) for each in pairwise(bounds)]
    expected = tiny.reference_logits(prompt_of(40))
    hidden = None
    for stage in stages:
        runner = harness(stage)
        hidden = runner.prefill_hidden(prompt_of(40), inputs_embeds=hidden)
    torch.testing.assert_close(stages[-1].compute_logits(hidden), expected, atol=1e-4, rtol=1e-4)
    held, whole = sum(stage.num_parameter_bytes for stage in stages), tiny.load().num_parameter_bytes
    is_tied = tiny.reference.config.tie_word_embeddings
    assert held - whole == (4 * tiny.reference.get_input_embeddings().weight.numel() if is_tied else 0)
