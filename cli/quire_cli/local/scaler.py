"""How many replicas one model of `quire up` should have: the operator's own function, fed by the gateway's demand."""

from quire_gateway.demand import Demand
from quire_operator.plan.scaling import ScalingInput, ScalingMemory, decide
from quire_operator.spec.llm_deployment import LLMDeployment

DEFAULT_TARGET = 16.0
"""Pending requests per replica where the manifest leaves it to us: a batch that two cores still answer briskly."""


class Scaler:
    """Remembers what `decide` wants remembered. Times are seconds of the event loop's clock."""

    def __init__(self, deployment: LLMDeployment, now: float) -> None:
        self._started = now
        self._memory: ScalingMemory | None = None
        self.wanted = initial_replicas(deployment)
        self.reason = "the manifest"

    def update(self, deployment: LLMDeployment, demand: Demand, num_ready: int, now: float) -> bool:
        """Decide again; whether the number changed."""
        before = self.wanted
        spec = deployment.spec
        if spec.suspend:
            self.wanted, self.reason = 0, "suspended"
        elif spec.scaling.mode == "Off":
            self.wanted, self.reason = initial_replicas(deployment), "scaling is off"
        else:
            target = spec.scaling.target_pending_per_replica
            decision = decide(
                ScalingInput(
                    demand=demand.total(now),
                    target_per_replica=DEFAULT_TARGET if target is None else float(target),
                    min_replicas=spec.scaling.min,
                    max_replicas=spec.scaling.max,
                    current_replicas=self.wanted,
                    pending_replicas=max(0, self.wanted - num_ready),
                    last_demand_time=self._started if demand.last_demand is None else demand.last_demand,
                    scale_down_delay_s=spec.scaling.scale_down_delay_s,
                    idle_to_zero_after_s=spec.scaling.idle_to_zero_after_s,
                    now=now,
                    memory=self._memory,
                )
            )
            self.wanted, self.reason, self._memory = decision.replicas, decision.reason, decision.memory
        return self.wanted != before


def initial_replicas(deployment: LLMDeployment) -> int:
    """What the manifest asks for; where it leaves that out, the least that it scales to, and at least one."""
    replicas = deployment.spec.replicas
    return max(1, deployment.spec.scaling.min) if replicas is None else replicas
