"""Norms. Weights are float32 whatever the model's dtype: they are small, and the arithmetic is float32 anyway."""

from typing import Protocol

from torch import Tensor

import quire_kernels as kernels


class Norm(Protocol):
    """A norm over the last dimension, alone or joined with the addition before it."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return norm(x)."""
        ...

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return norm(x + residual) and x + residual."""
        ...


class RmsNorm:
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, 2019)."""

    __slots__ = ("_eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight  # [size] float32
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.rms_norm(x, self.weight, self._eps, residual)


class LayerNorm:
    """(x − mean) / sqrt(variance + eps) · weight + bias (Ba et al., 2016)."""

    __slots__ = ("_eps", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight = weight  # [size] float32
        self.bias = bias  # [size] float32
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.layer_norm(x, self.weight, self.bias, self._eps, residual)
