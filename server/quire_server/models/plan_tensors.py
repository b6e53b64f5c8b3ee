"""The tensors of a plan, each with where it is held, what it takes once loaded, and how devices divide it. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from quire_server.models.plan import LinearPlan, ModelPlan, NormPlan, TablePlan
from quire_server.models.spec import AttentionSpec, DecoderSpec

Place = int | Literal["first", "last"]
_NORM_ITEM_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTensor:
    """One tensor of the checkpoint."""

    name: str
    place: Place
    """The layer, or the end of the model, that holds it."""
    num_elements: int
    is_float32: bool = False
    """Held in float32 whatever the model's dtype."""
    num_pieces: int = 1
    """Equal pieces that tensor parallelism deals out; 1: every device holds all."""

    def loaded_bytes(self, itemsize: int) -> int:
        """Return the bytes held once it is loaded into a model whose dtype has so many bytes."""
        return self.num_elements * (_NORM_ITEM_BYTES if self.is_float32 else itemsize)


def placed_tensors(spec: DecoderSpec, plan: ModelPlan) -> Iterator[PlacedTensor]:
    """Yield every tensor that is read, each once."""
    for first in (plan.token_embedding, plan.position_embedding, plan.project_in):
        yield from _tensors(first, "first", spec.vocab_size if first is plan.token_embedding else 1)
    for layer, parts in enumerate(plan.layers):
        for part in parts.parts():
            is_attention = part in (parts.qkv, parts.attention_output)
            pieces = spec.attention.num_heads if is_attention else spec.mlp.intermediate_size
            yield from _tensors(part, layer, pieces, spec.attention)
    for last in (plan.final_norm, plan.project_out, plan.lm_head):
        yield from _tensors(last, "last", spec.vocab_size)


def _tensors(
    part: TablePlan | NormPlan | LinearPlan | None,
    place: Place,
    num_pieces: int,
    attention: AttentionSpec | None = None,
) -> Iterator[PlacedTensor]:
    if part is None:
        return
    if isinstance(part, LinearPlan):
        yield from _linear_tensors(part, place, num_pieces, attention)
    elif isinstance(part, TablePlan):
        size = part.num_rows * part.row_size
        yield PlacedTensor(name=f"{part.module}.weight", place=place, num_elements=size, num_pieces=num_pieces)
    else:
        for name in ("weight", "bias") if part.spec.has_bias else ("weight",):
            yield PlacedTensor(name=f"{part.module}.{name}", place=place, num_elements=part.size, is_float32=True)


def _linear_tensors(
    part: LinearPlan, place: Place, num_pieces: int, attention: AttentionSpec | None
) -> Iterator[PlacedTensor]:
    is_split = part.weights.shard_dim is not None
    for index, (module, rows) in enumerate(zip(part.weights.modules, part.out_features, strict=True)):
        # Of query, key and value, the last two have fewer heads.
        is_kv = attention is not None and len(part.out_features) == 3 and index > 0
        pieces = attention.num_kv_heads if is_kv and attention is not None else num_pieces
        yield PlacedTensor(
            name=f"{module}.weight",
            place=place,
            num_elements=prod((rows, part.in_features)),
            num_pieces=pieces if is_split else 1,
        )
        if part.has_bias:  # the inputs' slices add up, so that one bias is enough, whole
            is_bias_split = part.weights.shard_dim == 0
            yield PlacedTensor(
                name=f"{module}.bias", place=place, num_elements=rows, num_pieces=pieces if is_bias_split else 1
            )
