"""Turns a plan into the parts of a decoder, or of one worker's share of it. Knows no files; of kinds, their table."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from quire_server.models.kinds.attention import AttentionPlan
from quire_server.models.kinds.mlp import MlpPlan
from quire_server.models.modules.attention import build_attention
from quire_server.models.modules.embedding import Embedding, TiedEmbedding
from quire_server.models.modules.layers import (
    PLACEMENT_TO_LAYER,
    AttentionModule,
    DecoderLayer,
    FeedForwardModule,
    LayerParts,
)
from quire_server.models.modules.linear import Linear, TableLinear, TensorReader
from quire_server.models.modules.mlp import build_mlp
from quire_server.models.modules.norm import Norm
from quire_server.models.modules.part_builder import PartBuilder
from quire_server.models.planning.parts import NormPlan
from quire_server.models.planning.plan import ModelPlan
from quire_server.models.planning.sharding import ModelShare, table_rows

ATTENTIONS: dict[type, Callable[[Any, PartBuilder], AttentionModule]] = {AttentionPlan: build_attention}
FEED_FORWARDS: dict[type, Callable[[Any, PartBuilder], FeedForwardModule]] = {MlpPlan: build_mlp}
"""From a kind's plan to what builds it. A new kind is a line here."""


class Ends(NamedTuple):
    """What surrounds the layers. A pipeline stage has those ends that it is at."""

    token_embedding: Embedding | None = None
    position_embedding: Embedding | None = None
    project_in: Linear | None = None
    final_norm: Norm | None = None
    project_out: Linear | None = None
    lm_head: Linear | None = None


class ModelBuilder:
    """Builds layers in any order, from any thread."""

    def __init__(self, plan: ModelPlan, reader: TensorReader, share: ModelShare) -> None:
        self._plan = plan
        self._share = share
        self._parts = PartBuilder(reader, share, plan.spec.ropes)

    @property
    def num_parameter_bytes(self) -> int:
        """What the parts built so far hold."""
        return self._parts.num_parameter_bytes

    def build_ends(self) -> Ends:
        plan, parts = self._plan, self._parts
        is_first, is_last = self._share.is_first(), self._share.is_last(plan.spec.num_layers)
        head = parts.linear(plan.head()) if is_last else None
        ends = Ends()
        if is_first:
            ends = ends._replace(
                token_embedding=self._build_embedding(head),
                position_embedding=None if plan.position_embedding is None else parts.table(plan.position_embedding),
                project_in=None if plan.project_in is None else parts.linear(plan.project_in),
            )
        if is_last:
            ends = ends._replace(
                final_norm=self._norm(plan.final_norm),
                project_out=None if plan.project_out is None else parts.linear(plan.project_out),
                lm_head=head,
            )
        return ends

    def build_layer(self, index: int) -> DecoderLayer:
        plan = self._plan.layers[index]
        return PLACEMENT_TO_LAYER[plan.placement](
            LayerParts(
                attention=ATTENTIONS[type(plan.attention)](plan.attention, self._parts),
                feed_forward=FEED_FORWARDS[type(plan.feed_forward)](plan.feed_forward, self._parts),
                attention_norm=self._norm(plan.attention_norm),
                attention_output_norm=self._norm(plan.attention_output_norm),
                feed_forward_norm=self._norm(plan.feed_forward_norm),
                feed_forward_output_norm=self._norm(plan.feed_forward_output_norm),
            )
        )

    def _build_embedding(self, head: Linear | None) -> Embedding:
        """Tied weights are stored once where one worker holds both ends."""
        table = self._plan.token_embedding
        if self._plan.lm_head is not None or head is None:
            return self._parts.table(table)
        tied = TiedEmbedding(cast("TableLinear", head))  # of a method that can look up, as the plan has seen to
        return self._parts.of_shard(tied, table_rows(table, self._share), table)

    def _norm(self, plan: NormPlan | None) -> Norm | None:
        return None if plan is None else self._parts.norm(plan)
