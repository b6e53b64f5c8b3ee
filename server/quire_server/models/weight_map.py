"""Where a model's parameters come from: ours, fused, and the checkpoint's modules that make them up. Pure data.

A family declares a `WeightMap`; `{layer}` in a name is the layer's number. A linear layer is named by its module, not
its tensors, because how a module is stored (`.weight`, or `.qweight` and `.scales`) is its linear method's business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from quire_server.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeights:
    """A linear layer of ours: the checkpoint's modules, stacked along the output dimension."""

    modules: tuple[str, ...]
    shard_dim: Literal[0, 1] | None
    """What tensor parallelism divides: 0 the outputs of every module, 1 the inputs, None nothing."""
    row_order: Literal["stacked", "per_head_qkv"] = "stacked"
    """per_head_qkv: one module with rows [heads, 3, head_dim] (GPT-NeoX, BLOOM), stacked as [3, heads, head_dim]."""

    def at(self, layer: int) -> "LinearWeights":
        return replace(self, modules=tuple(module.format(layer=layer) for module in self.modules))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer. Norms are modules too (`.weight`, `.bias`)."""

    attention_norm: str
    qkv: LinearWeights
    attention_output: LinearWeights
    query_norm: str | None = None
    key_norm: str | None = None
    post_attention_norm: str | None = None
    """Sandwich placement only."""
    mlp_norm: str
    mlp_input: LinearWeights
    """Gate and up, or up alone."""
    mlp_output: LinearWeights
    post_mlp_norm: str | None = None
    """Sandwich placement only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """A whole model."""

    token_embedding: str
    position_embedding: str | None = None
    project_in: LinearWeights | None = None
    layer: LayerWeights
    final_norm: str | None
    project_out: LinearWeights | None = None
    lm_head: LinearWeights
    aliases: tuple[tuple[str, str], ...] = ()
    """(prefix, other prefix): a tensor that is not found is looked for under the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one architecture's configs and checkpoints are read."""

    build_spec: Callable[[Mapping[str, Any]], DecoderSpec]
    weights: WeightMap
