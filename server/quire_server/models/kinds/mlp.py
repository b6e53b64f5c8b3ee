"""The plain feed-forward: gated (SwiGLU, GeGLU) or not. What it is, how its weights are named, what it plans."""

from collections.abc import Iterator
from dataclasses import dataclass

from quire_server.models.hf_config import Activation
from quire_server.models.planning.layout import LinearWeights, Segment
from quire_server.models.planning.parts import LinearPlan, Planner


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    input: LinearWeights
    """Gate and up, or up alone."""
    output: LinearWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpPlan:
    spec: "MlpSpec"
    input: LinearPlan
    output: LinearPlan

    def parts(self) -> Iterator[LinearPlan]:
        yield self.input
        yield self.output


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    intermediate_size: int
    activation: Activation
    is_gated: bool
    has_bias: bool = False

    @property
    def activation_width(self) -> int:
        """All outputs of the first projection, and what is made of them."""
        return self.intermediate_size * (3 if self.is_gated else 2)

    def plan(self, weights: MlpWeights, planner: Planner) -> MlpPlan:
        inner = Segment(name="intermediate features", num_units=self.intermediate_size)
        outputs = (inner, inner) if self.is_gated else (inner,)
        return MlpPlan(
            spec=self,
            input=planner.linear(weights.input, outputs=outputs, inputs=planner.hidden(), has_bias=self.has_bias),
            output=planner.linear(weights.output, outputs=(planner.hidden(),), inputs=inner, has_bias=self.has_bias),
        )
