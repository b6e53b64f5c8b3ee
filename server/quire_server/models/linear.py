"""Linear layers: objects with a method.

A `LinearMethod` knows how a checkpoint stores a linear layer (which tensors, of what shape) and makes a `Linear` of
it, which knows how it runs. Models only ever call a `Linear`; a new quantisation is a new method in `weights/quant/`
and a line in `select_linear_method`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

import quire_kernels as kernels
from quire_server.errors import UnsupportedModelError
from quire_server.models.plan import LinearPlan


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


class TensorReader(Protocol):
    """Reads the checkpoint's tensors, on the model's device."""

    dtype: torch.dtype
    device: torch.device

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in `dtype` (None: as it is stored). It may be a view of the file: not to be written to."""
        ...


class LinearMethod(Protocol):
    """How a checkpoint stores linear layers. One per quantisation scheme."""

    def tensor_shapes(self, plan: LinearPlan) -> dict[str, tuple[int, ...]]:
        """Return the tensors of a layer and the shape that each must have."""
        ...

    def load(self, plan: LinearPlan, reader: TensorReader) -> Linear: ...


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


class UnquantizedMethod:
    """`module.weight` [out, in] and `module.bias` [out]."""

    def tensor_shapes(self, plan: LinearPlan) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for module, out_features in zip(plan.weights.modules, plan.out_features, strict=True):
            shapes[f"{module}.weight"] = (out_features, plan.in_features)
            if plan.has_bias:
                shapes[f"{module}.bias"] = (out_features,)
        return shapes

    def load(self, plan: LinearPlan, reader: TensorReader) -> UnquantizedLinear:
        weights = [order_rows(plan, reader.read(f"{name}.weight", reader.dtype)) for name in plan.weights.modules]
        packed = kernels.pack_weight(weights)
        if not plan.has_bias:
            return UnquantizedLinear(packed, None)
        biases = [order_rows(plan, reader.read(f"{name}.bias", reader.dtype)) for name in plan.weights.modules]
        return UnquantizedLinear(packed, torch.cat(biases))


def order_rows(plan: LinearPlan, tensor: Tensor) -> Tensor:  # [out_features, ...], both
    """Put the rows of a module in the order in which layers run: all queries, all keys, all values."""
    if plan.weights.row_order == "stacked":
        return tensor
    per_head = tensor.view(plan.num_heads, 3, -1, *tensor.shape[1:])  # [num_heads, 3, head_dim, ...]
    return per_head.transpose(0, 1).reshape(tensor.shape)


def select_linear_method(config: Mapping[str, Any]) -> LinearMethod:
    """Return how a checkpoint's linear layers are stored. Raises UnsupportedModelError for an unknown quantisation."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return UnquantizedMethod()
    name = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else quantization
    raise UnsupportedModelError(
        f"The checkpoint is quantised with {name!r}, which is not supported.",
        hint="Use the unquantised checkpoint, or a GGUF file.",
    )
