"""What a decoder-only model is, as data: `DecoderSpec`.

A family (`families/<family>.py`) maps a Hugging Face config to a spec and names its weights; `decoder.py` runs any
spec. Fusion, quantisation, adapters, parallelism and graphs are therefore written once, against the spec.
"""

from dataclasses import dataclass
from typing import Literal


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
class NormSpec:
    kind: Literal["rms", "layer"]
    eps: float
    weight_offset: float = 0.0
    """Added to the stored weight at load (Gemma: 1)."""
    has_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    soft_cap: float | None = None
    has_qk_norm: bool = False
    is_alibi: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    intermediate_size: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    is_gated: bool
    has_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer. Sizes are of the whole model; sharding divides them."""

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm: NormSpec
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """pre: x + f(norm(x)); post: norm(x + f(x)) (OPT-350m); sandwich: x + norm(f(norm(x))) (Gemma 2)."""
    has_final_norm: bool = True
    is_parallel_residual: bool = False
    """x + attention(norm1(x)) + mlp(norm2(x)) (GPT-NeoX)."""
    attention: AttentionSpec
    mlp: MlpSpec
    rope: RopeSpec | None = None
    learned_positions: LearnedPositionsSpec | None = None
    sliding_windows: tuple[int | None, ...]
    """[num_layers]; None: the layer sees everything."""
    embedding_size: int
    """Differs from hidden_size where the checkpoint projects in and out (OPT-350m)."""
    embedding_scale: float = 1.0
    logit_soft_cap: float | None = None
    tie_word_embeddings: bool = False
    has_lm_head_bias: bool = False
