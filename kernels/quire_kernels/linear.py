"""Linear layers: a weight packed once, multiplied many times, and read back row by row.

Owns the packed form of a weight and who multiplies with it: bfloat16 on a CPU runs on the native kernels (the layout is drawn
in `_cpu/csrc/linear_layout.h`), everything else on torch with the plain weight. Does not know quantisation or layers.

Invariants: a packed weight is never written after `pack_weight`; sums are float32 and are rounded once, to the output's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quire_kernels._cpu.native import INT64, POINTER, bind
from quire_kernels.device import Backend, backend_for

PANEL = 32  # output features per panel, kPanel in linear_layout.h
STEP = 32  # in_features per step, kStep

_pack = bind("quire_linear_pack_bf16", [POINTER, INT64, INT64, INT64, INT64, INT64, POINTER])
_linear = bind(
    "quire_linear_bf16", [POINTER, INT64, INT64, POINTER, INT64, INT64, POINTER, INT64, POINTER, INT64, INT64]
)
_gather = bind("quire_linear_gather_bf16", [POINTER, INT64, INT64, POINTER, INT64, POINTER], INT64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A linear layer's weight in the form its backend reads. Made by `pack_weight`; owns its memory unless it is plain."""

    data: Tensor  # native: [num_panels, num_steps, 2, 16, 16, 2] bfloat16; plain: [out_features, in_features]
    out_features: int
    in_features: int
    is_native: bool
    data_ptr: int

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weight, which is the dtype that `linear` wants of its input."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Return the device that the weight lies on."""
        return self.data.device

    @property
    def size_bytes(self) -> int:
        """Return the memory held, padding included."""
        return self.data.numel() * self.data.element_size()


def pack_weight(weight: Tensor | Sequence[Tensor]) -> PackedWeight:
    """Pack weight[out_features, in_features], or parts of it stacked along out_features, for `linear`.

    A plain (not native) packed weight shares memory with a single weight given. Raises ValueError on a wrong shape, dtype or
    device.
    """
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    _check_parts(parts)
    if parts[0].dtype == torch.bfloat16 and backend_for(parts[0]) is Backend.NATIVE:
        return _pack_native(parts)
    data = parts[0] if len(parts) == 1 else torch.cat(parts)
    return PackedWeight(
        data=data, out_features=data.shape[0], in_features=data.shape[1], is_native=False, data_ptr=data.data_ptr()
    )


def linear(
    x: Tensor,  # [num_tokens, in_features]; rows may be strided
    packed: PackedWeight,
    bias: Tensor | None = None,  # [out_features], the weight's dtype or float32
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [num_tokens, out_features]
    """Return x @ weight.T + bias in x's dtype, or in `out_dtype` (float32: logits keep the precision of the sums).

    Raises ValueError on a wrong shape, dtype or stride.
    """
    num_tokens, out_features = _check_input(x, packed), packed.out_features
    is_bias_float = bias is not None and _check_bias(bias, packed)
    dtype = x.dtype if out_dtype is None else out_dtype
    if not packed.is_native:
        return _linear_torch(x, packed.data, bias, dtype)
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        raise ValueError(f"linear: out_dtype must be bfloat16 or float32, not {dtype}")
    out = torch.empty((num_tokens, out_features), dtype=dtype)
    if num_tokens != 0:
        _linear.call(
            x.data_ptr(),
            x.stride(0),
            num_tokens,
            packed.data_ptr,
            out_features,
            packed.in_features,
            None if bias is None else bias.data_ptr(),
            is_bias_float,
            out.data_ptr(),
            out_features,
            dtype is torch.float32,
        )
    return out


def gather_rows(packed: PackedWeight, ids: Tensor) -> Tensor:
    """Return the rows ids[num_tokens] (int64) of the weight, exactly as they were packed: [num_tokens, in_features].

    This is the embedding lookup of a model whose embedding and output layer are one weight. Raises ValueError on an id that
    is no row.
    """
    if ids.dim() != 1 or ids.dtype != torch.int64 or ids.device != packed.device:
        raise ValueError(
            f"gather_rows: ids must be one-dimensional int64 on {packed.device}, "
            f"not {tuple(ids.shape)} {ids.dtype} on {ids.device}"
        )
    if not packed.is_native:
        return functional.embedding(ids, packed.data)
    ids = ids.contiguous()
    out = torch.empty((ids.shape[0], packed.in_features), dtype=packed.dtype)
    wrong = _gather.call(
        packed.data_ptr, packed.out_features, packed.in_features, ids.data_ptr(), ids.shape[0], out.data_ptr()
    )
    if wrong:
        raise ValueError(f"gather_rows: id {int(ids[wrong - 1])} is outside [0, {packed.out_features})")
    return out


def _pack_native(parts: list[Tensor]) -> PackedWeight:
    out_features, in_features = sum(part.shape[0] for part in parts), parts[0].shape[1]
    num_panels, num_steps = -(-out_features // PANEL), -(-in_features // STEP)
    data = torch.empty((num_panels, num_steps, 2, 16, 16, 2), dtype=torch.bfloat16)
    first_row = 0
    for index, part in enumerate(parts):
        rows = part if part.stride(1) == 1 else part.contiguous()
        is_last = index == len(parts) - 1
        _pack.call(rows.data_ptr(), rows.stride(0), rows.shape[0], in_features, first_row, is_last, data.data_ptr())
        first_row += rows.shape[0]
    return PackedWeight(
        data=data, out_features=out_features, in_features=in_features, is_native=True, data_ptr=data.data_ptr()
    )


def _check_parts(parts: list[Tensor]) -> None:
    if not parts:
        raise ValueError("pack_weight: no weight given")
    first = parts[0]
    for part in parts:
        if part.dim() != 2 or part.shape[0] == 0 or part.shape[1] == 0:
            raise ValueError(f"pack_weight: a weight is [out_features, in_features], not {tuple(part.shape)}")
        if part.shape[1] != first.shape[1] or part.dtype != first.dtype or part.device != first.device:
            raise ValueError(
                f"pack_weight: parts differ: {tuple(first.shape)} {first.dtype} {first.device} and "
                f"{tuple(part.shape)} {part.dtype} {part.device}"
            )


def _check_input(x: Tensor, packed: PackedWeight) -> int:
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"linear: x must be [num_tokens, {packed.in_features}], not {tuple(x.shape)}")
    data = packed.data
    if x.dtype is not data.dtype or x.device != data.device:
        raise ValueError(f"linear: x is {x.dtype} on {x.device}, the weight {data.dtype} on {data.device}")
    if packed.is_native and x.stride(1) != 1 and packed.in_features > 1:
        raise ValueError("linear: the last dimension of x must be contiguous")
    return x.shape[0]


def _check_bias(bias: Tensor, packed: PackedWeight) -> bool:
    """Return whether the bias is float32. Raises ValueError when it does not fit the weight."""
    if bias.dim() != 1 or bias.shape[0] != packed.out_features or bias.stride(0) != 1:
        raise ValueError(f"linear: bias must be contiguous [{packed.out_features}], not {tuple(bias.shape)}")
    if bias.dtype not in (torch.float32, packed.data.dtype) or bias.device != packed.data.device:
        raise ValueError(f"linear: bias is {bias.dtype} on {bias.device}, the weight {packed.dtype} on {packed.device}")
    return bias.dtype is torch.float32


def _linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if bias is not None and bias.dtype is not x.dtype:
        return (functional.linear(x, weight).float() + bias).to(dtype)
    return functional.linear(x, weight, bias).to(dtype)
