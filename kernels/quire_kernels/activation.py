"""Activations, alone and gated; computed in float32 whatever the dtype."""

import torch
from torch import Tensor

from quire_kernels._checks import argument_error
from quire_kernels._cpu.native import INT64, POINTER, bind
from quire_kernels.device import Backend, backend_for
from quire_kernels.reference import activation_ref, gated_activation_ref

_ARGTYPES = [POINTER, INT64, INT64, POINTER, INT64, INT64, INT64]
_DTYPE_TO_NATIVE = {
    torch.float32: bind("quire_activation_f32", _ARGTYPES),
    torch.bfloat16: bind("quire_activation_bf16", _ARGTYPES),
}
KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
"""Kind to its number in activation.cpp."""


def activation(x: Tensor, kind: str) -> Tensor:  # [num_tokens, size] -> [num_tokens, size]
    """Apply silu, gelu, gelu_tanh or relu to each element; rows of x may be strided, the result is contiguous.

    Raises:
        ValueError: the kind is unknown, or x is not two-dimensional floating point contiguous in its last dimension.
    """
    return _run("x", x, kind, is_gated=False)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:  # [num_tokens, 2 * size] -> [num_tokens, size]
    """Multiply the activated first half of each row with its second half (SwiGLU and its kin, Shazeer 2020).

    Raises:
        ValueError: the kind is unknown, or gate_up is not two-dimensional floating point, even in size, and contiguous
            in its last dimension.
    """
    return _run("gate_up", gate_up, kind, is_gated=True)


def _run(name: str, x: Tensor, kind: str, *, is_gated: bool) -> Tensor:
    number = KINDS.get(kind)
    if number is None:
        raise argument_error("kind", kind, "silu, gelu, gelu_tanh or relu")
    if x.dim() != 2 or not x.is_floating_point() or (x.stride(1) != 1 and x.shape[1] > 1):
        raise argument_error(name, x, "two-dimensional, floating point and contiguous in its last dimension")
    num_tokens, size = x.shape
    if is_gated:
        if size % 2 != 0:
            raise argument_error(name, x, "of an even size")
        size //= 2
    if backend_for(x) is not Backend.NATIVE:
        return gated_activation_ref(x, kind) if is_gated else activation_ref(x, kind)
    out = torch.empty((num_tokens, size), dtype=x.dtype)
    _DTYPE_TO_NATIVE[x.dtype].call(x.data_ptr(), x.stride(0), is_gated, out.data_ptr(), num_tokens, size, number)
    return out
