"""What a decoder-only model is, as data: `DecoderSpec`, a row of `LayerSpec`s and what surrounds them.

A family (`families/<family>.py`) maps a Hugging Face config to a spec and names its weights; `decoder.py` runs any
spec. Fusion, quantisation, adapters, parallelism and graphs are therefore written once, against the spec. What a kind
of attention or feed-forward is in particular is known to its own module in `kinds/`; here is what all of them answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

from quire_server.models.planning.parts import NormSpec, Part, Planner


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions. `inv_freq` already carries any scaling (linear, dynamic, llama3, yarn)."""

    rotary_dim: int
    inv_freq: tuple[float, ...]
    """[rotary_dim / 2]"""
    long_inv_freq: tuple[float, ...] | None = None
    """[rotary_dim / 2]; in use instead where more than `short_context_len` tokens are served (dynamic, longrope).
    Chosen once per process: keys that were rotated differently must never meet in one cache."""
    short_context_len: int | None = None
    attention_factor: float = 1.0
    """Multiplies cos and sin (yarn)."""
    is_interleaved: bool = False
    """Pairs are (2i, 2i + 1) rather than (i, i + rotary_dim / 2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositionsSpec:
    """A table of position embeddings, read at `position + offset` (OPT: 2)."""

    num_positions: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What a layer keeps of each token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    """0: one tensor is both (latent attention)."""
    sliding_window: int | None = None
    """Tokens that the layer looks back on, itself included; None: all."""


class KindPlan(Protocol):
    """The parts of an attention or a feed-forward. Its type decides what builds it (`modules/builder.py`)."""

    def parts(self) -> Iterator[Part]: ...


class LayerHalf(Protocol):
    """A frozen dataclass that says what a half of a layer is. Sizes are of the whole model; sharding divides them."""

    @property
    def activation_width(self) -> int:
        """Elements that one token holds at the widest moment."""
        ...

    def plan(self, weights: Any, planner: Planner) -> KindPlan:
        """Plan the parts, under the names that this kind's weights type gives them."""
        ...


class FeedForwardKind(LayerHalf, Protocol):
    """What one feed-forward is."""


class AttentionKind(LayerHalf, Protocol):
    """What one attention is: how it knows positions, and what it keeps."""

    @property
    def rope(self) -> RopeSpec | None:
        """None: this layer knows no positions."""
        ...

    @property
    def sliding_window(self) -> int | None: ...

    @property
    def kv_shape(self) -> KVShape: ...


NormPlacement = Literal["pre", "post", "sandwich", "output", "parallel", "parallel_shared"]
"""Where norms and residuals stand:
pre: x + f(norm(x)), for attention, then for the feed-forward
post: norm(x + f(x)) (OPT-350m)
sandwich: x + norm(f(norm(x))) (Gemma 2)
output: x + norm(f(x)) (OLMo 2)
parallel: x + attention(norm(x)) + mlp(norm'(x)) (GPT-NeoX)
parallel_shared: x + attention(norm(x)) + mlp(norm(x)) (GPT-J, Phi, Falcon, Command-R)
"""
_PLACEMENT_TO_NORMS: dict[NormPlacement, tuple[str, ...]] = {
    "pre": ("attention", "feed_forward"),
    "post": ("attention", "feed_forward"),
    "sandwich": ("attention", "attention_output", "feed_forward", "feed_forward_output"),
    "output": ("attention_output", "feed_forward_output"),
    "parallel": ("attention", "feed_forward"),
    "parallel_shared": ("attention",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorms:
    """The norms of a layer. Which of them there are is the placement's."""

    placement: NormPlacement
    attention: NormSpec | None = None
    attention_output: NormSpec | None = None
    feed_forward: NormSpec | None = None
    feed_forward_output: NormSpec | None = None

    def __post_init__(self) -> None:
        names = (field.name for field in fields(self) if field.name != "placement")
        given = tuple(name for name in names if getattr(self, name) is not None)
        if set(given) != set(_PLACEMENT_TO_NORMS[self.placement]):
            needed = ", ".join(_PLACEMENT_TO_NORMS[self.placement])
            raise ValueError(f"placement {self.placement!r} has norms for {needed}, not for {', '.join(given)}")

    @classmethod
    def alike(cls, placement: NormPlacement, norm: NormSpec) -> "LayerNorms":
        """Return the norms of a placement, all of one kind."""
        return cls(placement=placement, **dict.fromkeys(_PLACEMENT_TO_NORMS[placement], norm))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """All of one layer. Layers may differ from one another in everything."""

    attention: AttentionKind
    feed_forward: FeedForwardKind
    norms: LayerNorms


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer: its layers, and what is of the whole model."""

    architecture: str
    layers: tuple[LayerSpec, ...]
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    embedding_size: int
    """Differs from hidden_size where the checkpoint projects in and out (OPT-350m)."""
    embedding_scale: float = 1.0
    learned_positions: LearnedPositionsSpec | None = None
    final_norm: NormSpec | None
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    tie_word_embeddings: bool = False
    has_lm_head_bias: bool = False

    def __post_init__(self) -> None:
        if self.tie_word_embeddings and self.has_lm_head_bias:
            raise ValueError("a head that is tied to the embedding has no bias of its own")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """[num_layers]; None: the layer sees everything."""
        return tuple(layer.attention.sliding_window for layer in self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The different ways of rotating that there are among the layers, in their order."""
        return tuple(dict.fromkeys(layer.attention.rope for layer in self.layers if layer.attention.rope is not None))

    def map_layers(self, change: Callable[[int, LayerSpec], LayerSpec]) -> "DecoderSpec":
        """Return the same model with every layer changed."""
        return replace(self, layers=tuple(change(index, layer) for index, layer in enumerate(self.layers)))
