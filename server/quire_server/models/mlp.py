"""The feed-forward half of a layer: gated (SwiGLU, GeGLU; gate and up stacked in one product) or plain."""

from typing import Protocol

from torch import Tensor

import quire_kernels as kernels
from quire_server.models.linear import Linear


class Mlp(Protocol):
    def __call__(self, hidden: Tensor) -> Tensor:  # [num_tokens, hidden_size], both
        ...


class GatedMlp:
    """down(activation(gate(x)) · up(x)) (Shazeer, 2020)."""

    __slots__ = ("_activation", "_down", "_gate_up")

    def __init__(self, gate_up: Linear, down: Linear, activation: str) -> None:
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._down(kernels.gated_activation(self._gate_up(hidden), self._activation))


class PlainMlp:
    """down(activation(up(x)))."""

    __slots__ = ("_activation", "_down", "_up")

    def __init__(self, up: Linear, down: Linear, activation: str) -> None:
        self._up = up
        self._down = down
        self._activation = activation

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._down(kernels.activation(self._up(hidden), self._activation))
