"""RMSNorm and LayerNorm, with the residual addition that precedes them in a decoder.

Weights are float32 whatever the activations are; sums are taken in float32; inputs are never written.
"""

import struct
from typing import overload

import torch
from torch import Tensor

from quire_kernels._checks import argument_error
from quire_kernels._cpu.native import POINTER, NativeFunction, bind
from quire_kernels.device import Backend, backend_for
from quire_kernels.reference import layer_norm_ref, rms_norm_ref

_DTYPE_TO_RMS_NORM = {
    torch.float32: bind("quire_rms_norm_f32", [POINTER]),
    torch.bfloat16: bind("quire_rms_norm_bf16", [POINTER]),
}
_DTYPE_TO_LAYER_NORM = {
    torch.float32: bind("quire_layer_norm_f32", [POINTER]),
    torch.bfloat16: bind("quire_layer_norm_bf16", [POINTER]),
}
_pack_arguments = struct.Struct("13qd").pack  # NormArguments in norm.cpp


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,  # [num_tokens, hidden_size] or [num_tokens, num_heads, head_dim]
    weight: Tensor,  # [hidden_size] float32
    eps: float,
    residual: Tensor | None = None,  # as x
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension by its root mean square (Zhang and Sennrich 2019).

    With a residual, `new_residual = x + residual` and the result is `(norm(new_residual), new_residual)`. x and
    residual may be views whose last dimension is contiguous; the results are contiguous.

    Raises:
        ValueError: an argument's shape, dtype, device or stride does not fit; the message names it.
    """
    _check(x, weight, None, residual)
    if backend_for(x) is not Backend.NATIVE:
        return rms_norm_ref(x, weight, eps, residual)
    return _run(_DTYPE_TO_RMS_NORM[x.dtype], x, weight, None, eps, residual)


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: None = None) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,  # [num_tokens, hidden_size] or [num_tokens, num_heads, head_dim]
    weight: Tensor,  # [hidden_size] float32
    bias: Tensor | None,  # [hidden_size] float32
    eps: float,
    residual: Tensor | None = None,  # as x
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise mean and variance of the last dimension (Ba et al. 2016); residual and results as in `rms_norm`.

    Raises:
        ValueError: an argument's shape, dtype, device or stride does not fit; the message names it.
    """
    _check(x, weight, bias, residual)
    if backend_for(x) is not Backend.NATIVE:
        return layer_norm_ref(x, weight, bias, eps, residual)
    return _run(_DTYPE_TO_LAYER_NORM[x.dtype], x, weight, bias, eps, residual)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    shape = x.shape
    if len(shape) not in (2, 3) or not x.is_floating_point():
        raise argument_error("x", x, "floating point with 2 or 3 dimensions")
    if x.stride(-1) != 1 and shape[-1] > 1:
        raise argument_error("x", x, "contiguous in its last dimension")
    size = shape[-1:]
    if weight.shape != size or weight.dtype != torch.float32 or weight.device != x.device or weight.stride(0) != 1:
        raise argument_error("weight", weight, f"contiguous float32{list(size)} on {x.device}")
    if bias is not None and (
        bias.shape != size or bias.dtype != torch.float32 or bias.device != x.device or bias.stride(0) != 1
    ):
        raise argument_error("bias", bias, f"contiguous float32{list(size)} on {x.device}")
    if residual is not None:
        if residual.shape != shape or residual.dtype != x.dtype or residual.device != x.device:
            raise argument_error("residual", residual, f"of x's shape {list(shape)}, dtype and device")
        if residual.stride(-1) != 1 and shape[-1] > 1:
            raise argument_error("residual", residual, "contiguous in its last dimension")


def _run(
    native: NativeFunction, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    shape = x.shape
    out = torch.empty(shape, dtype=x.dtype)
    new_residual = None if residual is None else torch.empty(shape, dtype=x.dtype)
    size = shape[-1]
    num_rows, inner = (shape[0], 1) if len(shape) == 2 else (shape[0] * shape[1], shape[1])
    if num_rows == 0:
        return out if new_residual is None else (out, new_residual)
    x_strides = x.stride()
    residual_strides = x_strides if residual is None else residual.stride()
    native.call(
        _pack_arguments(
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            0 if new_residual is None else new_residual.data_ptr(),
            num_rows,
            size,
            inner,
            x_strides[0],
            x_strides[1],
            residual_strides[0],
            residual_strides[1],
            eps,
        )
    )
    return out if new_residual is None else (out, new_residual)
