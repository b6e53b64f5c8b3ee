"""How the outputs of a linear layer lie in a checkpoint, and which of them are ours. Pure numbers; no tensors.

A linear layer of ours is a row of segments (query, key, value; gate, up), one after the other. A checkpoint keeps each
in a module of its own, or several fused in one: stacked, or dealt out by groups. Whatever the layout, what is wanted of
a module is said in one form: ranges of its outputs, in our order. Sharding and reordering are therefore one operation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from quire_server.shared.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Outputs (or inputs) of one meaning, in units that are never divided: heads, or single features."""

    name: str
    num_units: int
    unit_size: int = 1
    can_replicate: bool = False
    """A unit may be held by several ranks, where there are more of them than units (heads of key and value)."""

    @property
    def size(self) -> int:
        return self.num_units * self.unit_size


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeights:
    """A linear layer of ours in the checkpoint's modules: one for each of our segments, or one for all of them.

    `{layer}` in a name is the layer's number. A module is named, not its tensors, because how it is stored (`.weight`,
    or `.qweight` and `.scales`) is its linear method's business.
    """

    modules: tuple[str, ...]
    shard_dim: Literal[0, 1] | None
    """What tensor parallelism divides: 0 the outputs of every segment, 1 the inputs, None nothing."""
    layout: Literal["stacked", "grouped"] = "stacked"
    """Of one module with several segments. stacked: one after the other (Phi-3, GPT-2, BigCode, ChatGLM). grouped: as
    many groups as the smallest segment has units, each with its share of every segment: q … q, k, v for each head of
    key and value (Falcon, InternLM 2), which is [heads, 3, head_dim] where there are as many of those (GPT-NeoX)."""
    is_transposed: bool = False
    """Stored as [in, out] (GPT-2)."""

    def at(self, layer: int) -> "LinearWeights":
        return replace(self, modules=tuple(module.format(layer=layer) for module in self.modules))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLayout:
    """What one module of the checkpoint holds."""

    segments: tuple[Segment, ...]
    num_groups: int = 1
    """Each group has an equal share of every segment, in the segments' order."""
    is_transposed: bool = False

    @property
    def out_features(self) -> int:
        return sum(segment.size for segment in self.segments)

    def stored_shape(self, in_features: int) -> tuple[int, int]:
        shape = (self.out_features, in_features)
        return (shape[1], shape[0]) if self.is_transposed else shape

    def stored_ranges(self, units: tuple[range, ...]) -> tuple[range, ...]:
        """Return where the given units of each segment are stored, in our order, as few ranges as that takes."""
        merged: list[range] = []
        for piece in self._pieces(units):
            if merged and merged[-1].stop == piece.start:
                merged[-1] = range(merged[-1].start, piece.stop)
            elif piece:
                merged.append(piece)
        return tuple(merged)

    def _pieces(self, units: tuple[range, ...]) -> Iterator[range]:
        group_size = self.out_features // self.num_groups
        offset = 0
        for segment, wanted in zip(self.segments, units, strict=True):
            units_per_group = segment.num_units // self.num_groups
            for group in range(wanted.start // units_per_group, -(-wanted.stop // units_per_group)):
                first_unit = group * units_per_group
                start = max(wanted.start - first_unit, 0)
                stop = min(wanted.stop - first_unit, units_per_group)
                base = group * group_size + offset
                yield range(base + start * segment.unit_size, base + stop * segment.unit_size)
            offset += units_per_group * segment.unit_size


def module_layouts(weights: LinearWeights, segments: tuple[Segment, ...]) -> tuple[ModuleLayout, ...]:
    """Return what each module of `weights` holds of our segments.

    Raises CheckpointError where the config's numbers do not make groups, ValueError where the weight map is wrong: its
    modules are neither one for all segments nor one for each.
    """
    if len(weights.modules) == len(segments):
        return tuple(ModuleLayout(segments=(segment,), is_transposed=weights.is_transposed) for segment in segments)
    if len(weights.modules) != 1:
        raise ValueError(f"{weights.modules} are neither one module nor one for each of {len(segments)} segments")
    num_groups = 1 if weights.layout == "stacked" else min(segment.num_units for segment in segments)
    for segment in segments:
        if segment.num_units % num_groups:
            name = weights.modules[0]
            raise CheckpointError(f"{name}: {segment.num_units} {segment.name} do not make {num_groups} groups")
    return (ModuleLayout(segments=segments, num_groups=num_groups, is_transposed=weights.is_transposed),)
