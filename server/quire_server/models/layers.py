"""A decoder layer: attention, feed-forward, and where the norms stand. One class per placement: a step has no branches.

Between layers the stream is `hidden + residual` (residual None: hidden alone); the addition is done by the next norm.
"""

from typing import Protocol

from torch import Tensor

from quire_server.models.attention import Attention, KVCache, StepContext
from quire_server.models.mlp import Mlp
from quire_server.models.norm import Norm


class DecoderLayer(Protocol):
    def __call__(
        self,
        hidden: Tensor,  # [num_tokens, hidden_size]
        residual: Tensor | None,  # [num_tokens, hidden_size]
        step: StepContext,
        kv_cache: KVCache,
    ) -> tuple[Tensor, Tensor | None]: ...


def add_and_norm(norm: Norm, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the norm of the stream, and the stream."""
    return (norm(hidden), hidden) if residual is None else norm.add(hidden, residual)


class PreNormLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    __slots__ = ("_attention", "_attention_norm", "_mlp", "_mlp_norm")

    def __init__(self, attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: Mlp) -> None:
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

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


class PostNormLayer(PreNormLayer):
    """norm(x + attention(x)), then norm(x + mlp(x)) (OPT-350m)."""

    __slots__ = ()

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        hidden, _ = self._attention_norm.add(self._attention(hidden, step, kv_cache), hidden)
        hidden, _ = self._mlp_norm.add(self._mlp(hidden), hidden)
        return hidden, None


class SandwichLayer(PreNormLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))) (Gemma 2)."""

    __slots__ = ("_post_attention_norm", "_post_mlp_norm")

    def __init__(
        self,
        attention_norm: Norm,
        attention: Attention,
        mlp_norm: Norm,
        mlp: Mlp,
        *,
        post_attention_norm: Norm,
        post_mlp_norm: Norm,
    ) -> None:
        super().__init__(attention_norm, attention, mlp_norm, mlp)
        self._post_attention_norm = post_attention_norm
        self._post_mlp_norm = post_mlp_norm

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        hidden, residual = add_and_norm(self._attention_norm, hidden, residual)
        attended = self._post_attention_norm(self._attention(hidden, step, kv_cache))
        hidden, residual = self._mlp_norm.add(attended, residual)
        return self._post_mlp_norm(self._mlp(hidden)), residual
