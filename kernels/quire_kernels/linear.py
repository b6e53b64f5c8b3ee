"""Linear layers: a weight packed once, multiplied many times, and read back row by row.

Owns the packed form of a weight and who multiplies with it: bfloat16 on a CPU runs on the native kernels (the layout is
drawn in `_cpu/csrc/linear_layout.h`), everything else on torch with the plain weight. Does not know quantisation.

Invariants: a packed weight is never written after `pack_weight`; native sums are float32, rounded once at the end.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quire_kernels._checks import argument_error
from quire_kernels._cpu.arena import Arena
from quire_kernels._cpu.native import INT64, POINTER, bind
from quire_kernels.device import Backend, backend_for

PANEL = 32  # output features per panel, kPanel in linear_layout.h
STEP = 32  # input features per step, kStep

_arena = Arena()

_pack = bind("quire_linear_pack_bf16", [POINTER, INT64, INT64, INT64, INT64, POINTER])
_linear = bind("quire_linear_bf16", [POINTER])
_gather = bind("quire_linear_gather_bf16", [POINTER, INT64, INT64, POINTER, INT64, POINTER], INT64)
_pack_arguments = struct.Struct("11q").pack  # LinearArguments; one packed argument costs a quarter of eleven


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A linear layer's weight in the form that its backend reads. Made by `pack_weight`."""

    data: Tensor  # native: [num_panels, num_steps, 2, 16, 16, 2]; plain: [out_features, in_features]
    data_ptr: int
    out_features: int
    in_features: int
    dtype: torch.dtype  # of the weight, and of the input that `linear` wants
    device: torch.device
    is_native: bool

    @property
    def size_bytes(self) -> int:
        """Return the memory held, padding included."""
        return self.data.numel() * self.data.element_size()


def pack_weight(weight: Tensor | Sequence[Tensor]) -> PackedWeight:
    """Pack weight[out_features, in_features], or parts of it to be stacked along out_features, for `linear`.

    Native: the weight is copied and no longer needed. Otherwise a single weight is kept as it is, and shared.

    Raises:
        ValueError: a part is no matrix, is empty, or differs from the first in in_features, dtype or device.
    """
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    _check_parts(parts)
    if parts[0].dtype is torch.bfloat16 and backend_for(parts[0]) is Backend.NATIVE:
        return _pack_native(parts)
    data = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _wrap(data, data.shape[0], data.shape[1], is_native=False)


def linear(
    x: Tensor,  # [num_tokens, in_features]; rows may be strided
    packed: PackedWeight,
    bias: Tensor | None = None,  # [out_features], the weight's dtype or float32
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [num_tokens, out_features]
    """Return x @ weight.T + bias in x's dtype, or in `out_dtype`: float32 keeps for logits what the sums have.

    Raises:
        ValueError: an argument's shape, dtype, device or stride does not fit; the message names it.
    """
    shape = x.shape
    if len(shape) != 2 or shape[1] != packed.in_features or x.dtype is not packed.dtype or x.device != packed.device:
        raise argument_error("x", x, f"[num_tokens, {packed.in_features}] {packed.dtype} on {packed.device}")
    if bias is not None:
        _check_bias(bias, packed)
    if not packed.is_native:
        return _linear_torch(x, packed.data, bias, out_dtype)
    num_tokens, out_features = shape[0], packed.out_features
    stride, last_stride = x.stride()
    if last_stride != 1 and packed.in_features > 1:
        raise argument_error("x", x, "contiguous in its last dimension")
    if out_dtype is None or out_dtype is torch.bfloat16:
        out = x.new_empty(num_tokens, out_features)
    elif out_dtype is torch.float32:
        out = torch.empty((num_tokens, out_features), dtype=torch.float32)
    else:
        raise argument_error("out_dtype", out_dtype, "None, torch.bfloat16 or torch.float32")
    if num_tokens != 0:
        _linear.call(
            _pack_arguments(
                *(x.data_ptr(), stride, num_tokens, packed.data_ptr, out_features, packed.in_features),
                *(0, 0) if bias is None else (bias.data_ptr(), bias.dtype is torch.float32),
                *(out.data_ptr(), out_features, out_dtype is torch.float32),
            )
        )
    return out


def gather_rows(packed: PackedWeight, ids: Tensor) -> Tensor:
    """Return the rows ids[num_tokens] (int64) of the weight, bit for bit as packed: [num_tokens, in_features].

    This is the embedding lookup of a model whose embedding and output layer share one weight.

    Raises:
        ValueError: ids is no int64 vector on the weight's device, or an id is no row of the weight.
    """
    if ids.dim() != 1 or ids.dtype is not torch.int64 or ids.device != packed.device:
        raise argument_error("ids", ids, f"a vector of int64 on {packed.device}")
    if not packed.is_native:
        if (
            packed.device.type == "cpu"
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < packed.out_features
        ):
            raise argument_error("ids", ids, f"within [0, {packed.out_features})")
        return functional.embedding(ids, packed.data)
    ids = ids.contiguous()
    out = torch.empty((ids.shape[0], packed.in_features), dtype=packed.dtype)
    wrong = _gather.call(
        packed.data_ptr, packed.out_features, packed.in_features, ids.data_ptr(), ids.shape[0], out.data_ptr()
    )
    if wrong != 0:
        raise argument_error(f"ids[{wrong - 1}]", int(ids[wrong - 1]), f"within [0, {packed.out_features})")
    return out


def _wrap(data: Tensor, out_features: int, in_features: int, *, is_native: bool) -> PackedWeight:
    return PackedWeight(
        data=data,
        data_ptr=data.data_ptr(),
        out_features=out_features,
        in_features=in_features,
        dtype=data.dtype,
        device=data.device,
        is_native=is_native,
    )


def _pack_native(parts: list[Tensor]) -> PackedWeight:
    out_features, in_features = sum(part.shape[0] for part in parts), parts[0].shape[1]
    num_panels, num_steps = -(-out_features // PANEL), -(-in_features // STEP)
    data = _arena.empty(num_panels * num_steps * 2 * 16 * 16 * 2 * 2).view(torch.bfloat16)
    data = data.view(num_panels, num_steps, 2, 16, 16, 2)
    first_row = 0
    for part in parts:
        rows = part if part.stride(1) == 1 else part.contiguous()
        _pack.call(rows.data_ptr(), rows.stride(0), rows.shape[0], in_features, first_row, data.data_ptr())
        first_row += rows.shape[0]
    return _wrap(data, out_features, in_features, is_native=True)


def _check_parts(parts: list[Tensor]) -> None:
    if not parts:
        raise argument_error("weight", parts, "a matrix or several")
    first = parts[0]
    for part in parts:
        if part.dim() != 2 or part.numel() == 0:
            raise argument_error("weight", part, "[out_features, in_features], neither of them 0")
        if part.shape[1] != first.shape[1] or part.dtype is not first.dtype or part.device != first.device:
            raise argument_error(
                "weight", part, f"like the first part, [..., {first.shape[1]}] {first.dtype} on {first.device}"
            )


def _check_bias(bias: Tensor, packed: PackedWeight) -> None:
    is_fitting = bias.dim() == 1 and bias.shape[0] == packed.out_features and bias.is_contiguous()
    if not is_fitting or bias.dtype not in (packed.dtype, torch.float32) or bias.device != packed.device:
        raise argument_error("bias", bias, f"[{packed.out_features}] float32 or {packed.dtype} on {packed.device}")


def _linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    x = x.contiguous()  # with strided bfloat16 rows oneDNN (3.12) lets what lies between them leak into sums
    if bias is not None and bias.dtype is not x.dtype:
        out = functional.linear(x, weight).to(torch.float32) + bias
        return out.to(x.dtype if out_dtype is None else out_dtype)
    out = functional.linear(x, weight, bias)
    return out if out_dtype is None else out.to(out_dtype)
