"""Linear layers as they run, and how each method's are loaded: the torch side of `planning/linear_method.py`.

Models only ever call a `Linear`. A new quantisation brings its own class and a line in `LOADERS`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import quire_kernels as kernels
from quire_server.models.planning.linear_method import UnquantizedMethod
from quire_server.models.planning.parts import LinearPlan, ModulePlan
from quire_server.models.planning.sharding import ModelShare, ModuleShard, shard_module


class Linear(Protocol):
    """A loaded linear layer."""

    @property
    def size_bytes(self) -> int: ...

    def __call__(
        self,
        x: Tensor,  # [num_tokens, in_features]
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:  # [num_tokens, out_features], in x's dtype or `out_dtype`
        ...


class TableLinear(Linear, Protocol):
    """A linear layer whose weight is an embedding too."""

    def look_up(self, ids: Tensor) -> Tensor:  # [num_tokens] int64 -> [num_tokens, in_features], freshly made
        """Return rows of the weight."""
        ...


class RawTensor(NamedTuple):
    """A stored tensor as it lies, but for its rows' order: not to be written to."""

    encoding: str
    shape: tuple[int, ...]
    data: Tensor  # [num_bytes] uint8


class TensorReader(Protocol):
    """Reads the checkpoint's tensors, on the model's device."""

    dtype: torch.dtype
    device: torch.device

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in `dtype` (None: as it is stored). It may be a view of the file: not to be written to."""
        ...

    def raw(self, name: str) -> RawTensor:
        """Return a tensor's bytes, still encoded, in Hugging Face's row order."""
        ...


def load_linear(plan: LinearPlan, share: ModelShare, reader: TensorReader) -> Linear:
    """Load a rank's share of a linear layer: in one product where its modules are stored alike."""
    kinds = {(module.method, module.has_bias) for module in plan.modules}
    if len(kinds) > 1:
        return StackedLinear([load_linear(each, share, reader) for each in plan.by_module()])
    return LOADERS[type(plan.modules[0].method)](plan, share, reader)


def take(
    tensor: Tensor,  # [out, in], as stored perhaps transposed; or [out]
    module: ModulePlan,
    shard: ModuleShard,
) -> Tensor:  # the shard's [out, in] or [out], contiguous; a view where it is the whole
    """Bring a stored tensor into our order, and cut a rank's share out of it."""
    if tensor.dim() == 1:
        return _take_outputs(tensor, shard)
    if module.layout.is_transposed:
        tensor = tensor.t()
    return _take_outputs(tensor, shard)[:, shard.inputs.start : shard.inputs.stop].contiguous()


def _take_outputs(tensor: Tensor, shard: ModuleShard) -> Tensor:
    if len(shard.outputs) == 1:
        return take_rows(tensor, shard.outputs[0])
    return torch.cat([tensor[piece.start : piece.stop] for piece in shard.outputs])


def take_rows(tensor: Tensor, rows: range) -> Tensor:
    """Return some rows: all of them as they are (perhaps mapped), fewer as a copy, so that the others are let go."""
    return tensor if len(rows) == len(tensor) else tensor[rows.start : rows.stop].clone()


class UnquantizedLinear:
    """Weights in the dtype of the activations."""

    __slots__ = ("bias", "packed")

    def __init__(self, packed: kernels.PackedWeight, bias: Tensor | None) -> None:
        self.packed = packed
        self.bias = bias  # [out_features]

    @property
    def size_bytes(self) -> int:
        return self.packed.size_bytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return kernels.linear(x, self.packed, self.bias, out_dtype=out_dtype)

    def look_up(self, ids: Tensor) -> Tensor:
        return kernels.gather_rows(self.packed, ids)


class StackedLinear:
    """Modules that are stored in different ways, or have no bias all of them: each multiplies by itself."""

    __slots__ = ("_linears",)

    def __init__(self, linears: list[Linear]) -> None:
        self._linears = linears

    @property
    def size_bytes(self) -> int:
        return sum(linear.size_bytes for linear in self._linears)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return torch.cat([linear(x, out_dtype) for linear in self._linears], dim=1)


def load_unquantized(plan: LinearPlan, share: ModelShare, reader: TensorReader) -> UnquantizedLinear:
    """Load `module.weight` and `module.bias` of every module, and pack them as one."""
    shards = [(module, shard_module(plan, module, share)) for module in plan.modules]

    def read(name: str) -> list[Tensor]:
        return [take(reader.read(f"{module.name}.{name}", reader.dtype), module, shard) for module, shard in shards]

    packed = kernels.pack_weight(read("weight"))
    return UnquantizedLinear(packed, torch.cat(read("bias")) if shards[0][1].has_bias else None)


LOADERS: dict[type, Callable[[LinearPlan, ModelShare, TensorReader], Linear]] = {UnquantizedMethod: load_unquantized}
"""From a `LinearMethod` to what makes a layer of modules that it stores."""
