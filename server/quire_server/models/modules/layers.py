"""A decoder layer: attention, feed-forward, and where the norms stand. One class per placement: a step has no branches.

Between layers the stream is `hidden + residual` (residual None: hidden alone); the addition is done by the next norm.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quire_server.models.attention import KVCache, StepContext
from quire_server.models.modules.norm import Norm
from quire_server.models.planning.spec import NormPlacement


class AttentionModule(Protocol):
    """An attention of any kind."""

    def __call__(
        self,
        hidden: Tensor,  # [num_tokens, hidden_size]
        step: StepContext,
        kv_cache: KVCache,
    ) -> Tensor:  # [num_tokens, hidden_size], freshly made
        ...


class FeedForwardModule(Protocol):
    """A feed-forward of any kind."""

    def __call__(self, hidden: Tensor) -> Tensor:  # [num_tokens, hidden_size], both
        ...


class DecoderLayer(Protocol):
    def __call__(
        self,
        hidden: Tensor,  # [num_tokens, hidden_size]
        residual: Tensor | None,  # [num_tokens, hidden_size]
        step: StepContext,
        kv_cache: KVCache,
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a layer is made of. Which norms there are is the placement's."""

    attention: AttentionModule
    feed_forward: FeedForwardModule
    attention_norm: Norm | None
    attention_output_norm: Norm | None
    feed_forward_norm: Norm | None
    feed_forward_output_norm: Norm | None


def add_and_norm(norm: Norm, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the norm of the stream, and the stream."""
    return (norm(hidden), hidden) if residual is None else norm.add(hidden, residual)


def join(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """Return the stream."""
    return hidden if residual is None else hidden + residual


class PreNormLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    __slots__ = ("_attention", "_attention_norm", "_mlp", "_mlp_norm")

    def __init__(self, parts: LayerParts) -> None:
        assert parts.attention_norm is not None
        assert parts.feed_forward_norm is not None
        self._attention = parts.attention
        self._attention_norm = parts.attention_norm
        self._mlp = parts.feed_forward
        self._mlp_norm = parts.feed_forward_norm

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        hidden, residual = add_and_norm(self._attention_norm, hidden, residual)
        hidden, residual = self._mlp_norm.add(self._attention(hidden, step, kv_cache), residual)
        return self._mlp(hidden), residual


class ParallelLayer(PreNormLayer):
    """x + attention(norm1(x)) + mlp(norm2(x)) (GPT-NeoX)."""

    __slots__ = ()

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        hidden, residual = add_and_norm(self._attention_norm, hidden, residual)
        mlp_output = self._mlp(self._mlp_norm(residual))
        return self._attention(hidden, step, kv_cache).add_(mlp_output), residual


class SharedNormLayer:
    """x + attention(norm(x)) + mlp(norm(x)) (GPT-J)."""

    __slots__ = ("_attention", "_mlp", "_norm")

    def __init__(self, parts: LayerParts) -> None:
        assert parts.attention_norm is not None
        self._attention = parts.attention
        self._mlp = parts.feed_forward
        self._norm = parts.attention_norm

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        hidden, residual = add_and_norm(self._norm, hidden, residual)
        mlp_output = self._mlp(hidden)
        return self._attention(hidden, step, kv_cache).add_(mlp_output), residual


class PostNormLayer(PreNormLayer):
    """norm(x + attention(x)), then norm(x + mlp(x)) (OPT-350m)."""

    __slots__ = ()

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        hidden = join(hidden, residual)
        hidden, _ = self._attention_norm.add(self._attention(hidden, step, kv_cache), hidden)
        hidden, _ = self._mlp_norm.add(self._mlp(hidden), hidden)
        return hidden, None


class OutputNormLayer:
    """x + norm(attention(x)), then x + norm(mlp(x)) (OLMo 2)."""

    __slots__ = ("_attention", "_attention_output_norm", "_mlp", "_mlp_output_norm")

    def __init__(self, parts: LayerParts) -> None:
        assert parts.attention_output_norm is not None
        assert parts.feed_forward_output_norm is not None
        self._attention = parts.attention
        self._attention_output_norm = parts.attention_output_norm
        self._mlp = parts.feed_forward
        self._mlp_output_norm = parts.feed_forward_output_norm

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        hidden = join(hidden, residual)
        hidden = self._attention_output_norm(self._attention(hidden, step, kv_cache)).add_(hidden)
        return self._mlp_output_norm(self._mlp(hidden)), hidden


class SandwichLayer(PreNormLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))) (Gemma 2)."""

    __slots__ = ("_attention_output_norm", "_mlp_output_norm")

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        assert parts.attention_output_norm is not None
        assert parts.feed_forward_output_norm is not None
        self._attention_output_norm = parts.attention_output_norm
        self._mlp_output_norm = parts.feed_forward_output_norm

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        hidden, residual = add_and_norm(self._attention_norm, hidden, residual)
        attended = self._attention_output_norm(self._attention(hidden, step, kv_cache))
        hidden, residual = self._mlp_norm.add(attended, residual)
        return self._mlp_output_norm(self._mlp(hidden)), residual


PLACEMENT_TO_LAYER: dict[NormPlacement, type[PreNormLayer | SharedNormLayer | OutputNormLayer]] = {
    "pre": PreNormLayer,
    "post": PostNormLayer,
    "sandwich": SandwichLayer,
    "output": OutputNormLayer,
    "parallel": ParallelLayer,
    "parallel_shared": SharedNormLayer,
}
