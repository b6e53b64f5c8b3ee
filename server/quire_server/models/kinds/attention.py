"""Attention over all heads' keys and values (MHA, GQA, MQA). What it is, how its weights are named, what it plans."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from quire_server.models.planning.layout import LinearWeights, Segment
from quire_server.models.planning.parts import LinearPlan, NormPlan, NormSpec, Part, Planner
from quire_server.models.planning.spec import KVShape, RopeSpec
from quire_server.shared.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    qkv: LinearWeights
    output: LinearWeights
    query_norm: str | None = None
    key_norm: str | None = None
    sinks: str | None = None
    """A tensor, not a module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    spec: "AttentionSpec"
    query_heads: Segment
    kv_heads: Segment
    qkv: LinearPlan
    output: LinearPlan
    query_norm: NormPlan | None
    key_norm: NormPlan | None

    def parts(self) -> Iterator[Part]:
        for part in (self.qkv, self.output, self.query_norm, self.key_norm):
            if part is not None:
                yield part


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None = None
    """None: no rotation."""
    sliding_window: int | None = None
    """Tokens that are seen, the query itself included; None: all."""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    soft_cap: float | None = None
    qk_norm: NormSpec | None = None
    """Of query and key, before rotation."""
    qk_norm_scope: Literal["head", "projection"] = "head"
    """Each head by itself (Qwen 3), or all heads of a token together (OLMo 2)."""
    is_alibi: bool = False
    has_sinks: bool = False
    """A learned score for each head that takes its share of the softmax and gives nothing (gpt-oss). No kernel has it
    yet: planning such a layer is refused, before anything is read or counted."""

    def with_windows(self, windows: Sequence[int | None]) -> list["AttentionSpec"]:
        """Return the same attention for one layer after the other, each with its own window."""
        return [replace(self, sliding_window=window) for window in windows]

    @property
    def kv_shape(self) -> KVShape:
        return KVShape(
            num_kv_heads=self.num_kv_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            sliding_window=self.sliding_window,
        )

    @property
    def activation_width(self) -> int:
        """Query, key and value, and as much again for what is made of them."""
        return 2 * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def plan(self, weights: AttentionWeights, planner: Planner) -> AttentionPlan:
        """Raises UnsupportedModelError for what no kernel runs."""
        if self.has_sinks:
            owner, sinks = planner.name(weights.qkv.modules[0]), planner.name(weights.sinks or "unnamed")
            raise UnsupportedModelError(f"{owner}: attention sinks ({sinks}) are not supported.")
        head_dim, is_per_head = self.head_dim, self.qk_norm_scope == "head"
        queries = Segment(name="heads", num_units=self.num_heads, unit_size=head_dim)
        kv_heads = Segment(name="KV heads", num_units=self.num_kv_heads, unit_size=head_dim, can_replicate=True)
        return AttentionPlan(
            spec=self,
            query_heads=queries,
            kv_heads=kv_heads,
            qkv=planner.linear(
                weights.qkv, outputs=(queries, kv_heads, kv_heads), inputs=planner.hidden(), has_bias=self.has_qkv_bias
            ),
            output=planner.linear(
                weights.output, outputs=(planner.hidden(),), inputs=queries, has_bias=self.has_output_bias
            ),
            query_norm=planner.norm(weights.query_norm, self.qk_norm, head_dim if is_per_head else queries.size),
            key_norm=planner.norm(weights.key_norm, self.qk_norm, head_dim if is_per_head else kv_heads.size),
        )
