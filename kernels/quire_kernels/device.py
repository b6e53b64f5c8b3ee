"""Which implementation runs an op, decided in one place.

Owns the choice from a tensor's device and dtype and from the CPU library that is loaded. Does not know any op: an op
asks `backend_for(tensor)` and has one branch per answer.
"""

from enum import Enum

import torch
from torch import Tensor

from quire_kernels._cpu import native

_ISA_TO_LABEL = {"amx": "amx", "avx512": "avx512_bf16", "avx2": "avx2", native.NO_ISA: "torch"}
_NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16})


class Backend(Enum):
    """Where an op runs."""

    NATIVE = "native"  # the compiled CPU kernels
    TORCH = "torch"  # torch's own operators, on any device


def backend_for(tensor: Tensor) -> Backend:
    """Return who runs an op on this tensor: the CPU kernels take float32 and bfloat16, torch takes the rest."""
    if tensor.is_cpu and tensor.dtype in _NATIVE_DTYPES and native.library() is not None:
        return Backend.NATIVE
    return Backend.TORCH


def backend_summary(device: torch.device | str = "cpu") -> str:
    """Return what runs the ops on this device, for the start-up log: "cpu (amx)", "cuda:0 NVIDIA H100"."""
    device = torch.device(device)
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return f"cuda:{index} {torch.cuda.get_device_name(index)}"
    if device.type == "cpu":
        return f"cpu ({_ISA_TO_LABEL[native.isa()]})"
    return str(device)
