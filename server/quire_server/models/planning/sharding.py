"""Which part of a model one worker holds: its share of every layer (tensor parallel), and its layers (pipeline).

Pure: says which outputs and inputs of which stored module a rank reads, and refuses by name what does not divide.
Invariant: the slices of all ranks, joined, are the whole; only units that may be replicated are held twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from quire_contract.memory.model_shape import bytes_on_device, can_divide
from quire_server.models.planning.layout import Segment
from quire_server.models.planning.parts import LinearPlan, ModulePlan, TablePlan, TensorPlan
from quire_server.shared.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShare:
    """What one worker holds. By default everything."""

    rank: int = 0
    world_size: int = 1
    """Of the tensor-parallel group."""
    layers: range | None = None
    """Of the pipeline stage; None: all. The stage with the first layer embeds, the one with the last has the head."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is none of {self.world_size}")

    def stage(self, num_layers: int) -> range:
        return range(num_layers) if self.layers is None else self.layers

    def is_first(self) -> bool:
        return self.layers is None or self.layers.start == 0

    def is_last(self, num_layers: int) -> bool:
        return self.layers is None or self.layers.stop == num_layers


WHOLE = ModelShare()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShard:
    """What a rank reads of one module."""

    outputs: tuple[range, ...]
    """In our order."""
    inputs: range
    has_bias: bool
    """Where inputs are divided, results are summed: the bias is the first rank's alone."""


def shard_module(plan: LinearPlan, module: ModulePlan, share: ModelShare) -> ModuleShard:
    """Return a rank's slice of one module of a linear layer. Raises UnsupportedModelError naming the module."""
    segments = module.layout.segments
    if plan.shard_dim == 0:
        units = tuple(shard_units(segment, share, module.name) for segment in segments)
    else:
        units = tuple(range(segment.num_units) for segment in segments)
    inputs = range(plan.inputs.size)
    if plan.shard_dim == 1:
        own = shard_units(plan.inputs, share, module.name)
        inputs = range(own.start * plan.inputs.unit_size, own.stop * plan.inputs.unit_size)
    return ModuleShard(
        outputs=module.layout.stored_ranges(units),
        inputs=inputs,
        has_bias=module.has_bias and (plan.shard_dim != 1 or share.rank == 0),
    )


def shard_units(segment: Segment, share: ModelShare, owner: str) -> range:
    """Return which units of a segment a rank holds. Raises UnsupportedModelError naming the owner."""
    num_units, world_size = segment.num_units, share.world_size
    if not can_divide(num_units, segment.can_replicate, world_size):
        raise UnsupportedModelError(
            f"{owner}: {num_units} {segment.name} cannot be divided among {world_size} devices.",
            hint="Choose a --tensor-parallel-size that divides it.",
        )
    begin = share.rank * num_units // world_size
    return range(begin, begin + max(1, num_units // world_size))


def table_rows(plan: TablePlan, share: ModelShare) -> range:
    """Return which rows of a table a rank holds. Raises UnsupportedModelError naming the module."""
    return shard_units(plan.rows(), share, plan.name) if plan.is_split else range(plan.num_rows)


def check_divides(tensors: Iterable[TensorPlan], share: ModelShare) -> None:
    """Check that a worker's tensors can be divided. Raises UnsupportedModelError naming the first that cannot."""
    for tensor in tensors:
        for segment in tensor.segments:
            shard_units(segment, share, tensor.name)


def loaded_bytes(tensor: TensorPlan, itemsize: int, share: ModelShare) -> int:
    """Return what a rank holds of a tensor once it is loaded."""
    return sum(
        bytes_on_device(pieces.num_bytes, pieces.num_pieces, share.world_size) for pieces in tensor.pieces(itemsize)
    )
