"""The plain feed-forward as it runs: gated (gate and up stacked in one product) or not. The kind is `kinds/mlp.py`."""

from torch import Tensor

import quire_kernels as kernels
from quire_server.models.kinds.mlp import MlpPlan
from quire_server.models.modules.linear import Linear
from quire_server.models.modules.part_builder import PartBuilder


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


def build_mlp(plan: MlpPlan, builder: PartBuilder) -> GatedMlp | PlainMlp:
    mlp_class = GatedMlp if plan.spec.is_gated else PlainMlp
    return mlp_class(builder.linear(plan.input), builder.linear(plan.output), plan.spec.activation)
