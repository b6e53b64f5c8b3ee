"""Every tensor that a model needs, with its shape and its size in memory, known before any is read.

The loader checks the whole plan against the checkpoint first, so that a wrong file fails in milliseconds and not after
minutes; whoever counts memory sums `ModelPlan.tensors()`. Knows no kind of layer: each plans itself (`kinds/`).
Pure, but for a tied head that is stored too: whether it is the embedding once more, its bytes say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from quire_server.models.planning.layout import Segment
from quire_server.models.planning.parts import (
    LinearPlan,
    MethodFor,
    NormPlan,
    Part,
    Planner,
    StoredLookup,
    TablePlan,
    TensorPlan,
    nothing_stored,
)
from quire_server.models.planning.spec import DecoderSpec, KindPlan, LayerSpec, NormPlacement
from quire_server.models.planning.weight_map import LayerWeights, WeightMap
from quire_server.weights.stored import StoredTensor, holds_same


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    placement: NormPlacement
    attention: KindPlan
    feed_forward: KindPlan
    attention_norm: NormPlan | None
    attention_output_norm: NormPlan | None
    feed_forward_norm: NormPlan | None
    feed_forward_output_norm: NormPlan | None

    def parts(self) -> Iterator[Part]:
        yield from self.attention.parts()
        yield from self.feed_forward.parts()
        norms = (self.attention_norm, self.attention_output_norm, self.feed_forward_norm, self.feed_forward_output_norm)
        yield from (norm for norm in norms if norm is not None)


class PlacedTensor(NamedTuple):
    """A tensor, and who reads it: a layer, or an end of the model."""

    place: int | Literal["first", "last"]
    tensor: TensorPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A whole model, undivided."""

    spec: DecoderSpec
    weights: WeightMap
    token_embedding: TablePlan
    position_embedding: TablePlan | None
    project_in: LinearPlan | None
    layers: tuple[LayerPlan, ...]
    final_norm: NormPlan | None
    project_out: LinearPlan | None
    lm_head: LinearPlan | None
    """None: the token embedding is used again; of several pipeline stages, the first and the last hold it."""

    def first_parts(self) -> Iterator[Part]:
        """Yield what comes before the layers."""
        parts = (self.token_embedding, self.position_embedding, self.project_in)
        yield from (part for part in parts if part is not None)

    def last_parts(self) -> Iterator[Part]:
        """Yield what comes after the layers, but for a tied head."""
        parts = (self.final_norm, self.project_out, self.lm_head)
        yield from (part for part in parts if part is not None)

    def tensors(self) -> Iterator[PlacedTensor]:
        """Yield every tensor that is read, once."""
        for part in self.first_parts():
            yield from (PlacedTensor("first", tensor) for tensor in part.tensors())
        for index, layer in enumerate(self.layers):
            for part in layer.parts():
                yield from (PlacedTensor(index, tensor) for tensor in part.tensors())
        for part in self.last_parts():
            yield from (PlacedTensor("last", tensor) for tensor in part.tensors())

    def head(self) -> LinearPlan:
        """Return the output layer, which is made of the token embedding where the two are tied."""
        if self.lm_head is not None:
            return self.lm_head
        return self.token_embedding.as_linear()


def build_plan(
    spec: DecoderSpec, weights: WeightMap, method_for: MethodFor, stored: StoredLookup = nothing_stored
) -> ModelPlan:
    """Plan a model. Raises UnsupportedModelError where a module is stored in a way that is not known."""
    planner = Planner(hidden_size=spec.hidden_size, method_for=method_for, stored=stored, num_layers=spec.num_layers)
    embedded = Segment(name="embedding features", num_units=spec.embedding_size)
    is_projected, positions = spec.embedding_size != spec.hidden_size, spec.learned_positions
    token_embedding = planner.table(
        weights.token_embedding,
        num_rows=spec.vocab_size,
        row_size=spec.embedding_size,
        is_split=weights.lm_head.shard_dim == 0,
    )
    return ModelPlan(
        spec=spec,
        weights=weights,
        token_embedding=token_embedding,
        position_embedding=None
        if positions is None or weights.position_embedding is None
        else planner.table(
            weights.position_embedding,
            num_rows=positions.num_positions + positions.offset,
            row_size=spec.hidden_size,
            is_split=False,
        ),
        project_in=planner.linear(weights.project_in, outputs=(planner.hidden(),), inputs=embedded)
        if is_projected and weights.project_in is not None
        else None,
        layers=tuple(
            _plan_layer(layer, weights.layer(index), replace(planner, layer=index))
            for index, layer in enumerate(spec.layers)
        ),
        final_norm=planner.norm(weights.final_norm, spec.final_norm),
        project_out=planner.linear(weights.project_out, outputs=(embedded,), inputs=planner.hidden())
        if is_projected and weights.project_out is not None
        else None,
        lm_head=_plan_head(spec, weights, planner, token_embedding),
    )


def _plan_head(
    spec: DecoderSpec, weights: WeightMap, planner: Planner, token_embedding: TablePlan
) -> LinearPlan | None:
    """Return the output layer; None: the token embedding is used again.

    What is stored overrules the config, as in `transformers`: a head that differs from the embedding is a head of its
    own. Where the config promises one that nobody stores, the embedding stands in, as in vLLM.
    """
    head = planner.linear(
        weights.lm_head,
        outputs=(Segment(name="vocabulary entries", num_units=spec.vocab_size),),
        inputs=Segment(name="embedding features", num_units=spec.embedding_size),
        has_bias=spec.has_lm_head_bias,
    )
    if not planner.knows_files:
        return None if spec.tie_word_embeddings else head
    stored = [planner.stored(tensor.name) for tensor in head.tensors()]
    if not any(stored):
        return None
    embedded = [planner.stored(tensor.name) for tensor in token_embedding.tensors()]
    return None if spec.tie_word_embeddings and _are_copies(stored, embedded) else head


def _are_copies(heads: Sequence[StoredTensor | None], tables: Sequence[StoredTensor | None]) -> bool:
    pairs = zip(heads, tables, strict=False)
    return len(heads) == len(tables) and all(a is not None and b is not None and holds_same(a, b) for a, b in pairs)


def _plan_layer(spec: LayerSpec, weights: LayerWeights, planner: Planner) -> LayerPlan:
    norms = spec.norms
    return LayerPlan(
        placement=norms.placement,
        attention=spec.attention.plan(weights.attention, planner),
        feed_forward=spec.feed_forward.plan(weights.feed_forward, planner),
        attention_norm=planner.norm(weights.attention_norm, norms.attention),
        attention_output_norm=planner.norm(weights.attention_output_norm, norms.attention_output),
        feed_forward_norm=planner.norm(weights.feed_forward_norm, norms.feed_forward),
        feed_forward_output_norm=planner.norm(weights.feed_forward_output_norm, norms.feed_forward_output),
    )
