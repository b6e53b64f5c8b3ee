"""What KEDA is told: demand comes from the gateway, and the number to write is the LLMDeployment's own.

`AverageValue` on demand (waiting and in flight) makes the wanted number independent of the number there is, so a slow
start does not cascade. Within bounds: an HPA takes no period above 1800 s and no window above 3600 s.
"""

from typing import Final

from quire_contract import names, paths, ports
from quire_kube.objects import Manifest
from quire_operator.plan.resources.child import build_child, whole_seconds
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.spec.kinds import SCALED_OBJECT

_POLLING_INTERVAL_S: Final = 5
_MAX_PERIOD_S: Final = 1800
_MAX_WINDOW_S: Final = 3600
_BUDGET_FACTOR: Final = 3
"""A load budget is three times the slowest start."""


def build_scaled_object(given: RenderInput) -> Manifest | None:
    """Build the ScaledObject; None where KEDA is not there, not wanted, or there is no gateway to ask."""
    scaling = given.deployment.spec.scaling
    is_wanted = scaling.mode in ("Auto", "KEDA") and given.settings.routes_through_gateway
    if not is_wanted or not given.cluster.has(SCALED_OBJECT):
        return None
    name = given.deployment.name
    return build_child(
        given,
        SCALED_OBJECT,
        names.workload_name(name),
        annotations={"autoscaling.keda.sh/paused": "true"} if given.deployment.spec.suspend else None,
        spec={
            "scaleTargetRef": {"apiVersion": names.GROUP_VERSION, "kind": names.KIND, "name": name},
            "pollingInterval": _POLLING_INTERVAL_S,
            "cooldownPeriod": whole_seconds(scaling.idle_to_zero_after_s or scaling.scale_down_delay_s),
            # Otherwise a model that nobody has asked yet is put to sleep before it has loaded.
            "initialCooldownPeriod": whole_seconds(given.load_budget_s),
            "minReplicaCount": scaling.min,
            "maxReplicaCount": scaling.max,
            "fallback": {
                "failureThreshold": 3,
                "replicas": max(scaling.min, 1),
                "behavior": "currentReplicasIfHigher",
            },
            "advanced": {
                "restoreToOriginalReplicaCount": False,
                "horizontalPodAutoscalerConfig": {"behavior": _behavior(given)},
            },
            "triggers": [_demand_trigger(given), *_schedule_triggers(given)],
        },
    )


def _behavior(given: RenderInput) -> Manifest:
    """One replica per start, so that the ones on their way count before more are asked for."""
    start_s = min(max(whole_seconds(given.load_budget_s / _BUDGET_FACTOR), 15), _MAX_PERIOD_S)
    window_s = min(whole_seconds(given.deployment.spec.scaling.scale_down_delay_s), _MAX_WINDOW_S)
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": start_s}],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": window_s,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
        },
    }


def _demand_trigger(given: RenderInput) -> Manifest:
    deployment = given.deployment
    host = f"{names.GATEWAY_SERVICE}.{given.cluster.operator_namespace}.svc:{ports.GATEWAY_ADMIN}"
    return {
        "type": "metrics-api",
        "metricType": "AverageValue",
        "metadata": {
            "url": f"http://{host}{paths.DEMAND}/{deployment.namespace}/{deployment.name}",
            "format": "json",
            "valueLocation": "demand",
            "targetValue": str(given.target_pending_per_replica),
            "activationTargetValue": "0",
            # Every gateway replica knows its own requests only.
            "aggregateFromKubeServiceEndpoints": "true",
            "aggregationType": "sum",
        },
    }


def _schedule_triggers(given: RenderInput) -> list[Manifest]:
    """Return a trigger for each window that asks for more than `scaling.min`; KEDA has no windows with another max."""
    return [
        {
            "type": "cron",
            "metadata": {
                "timezone": window.timezone,
                "start": window.start,
                "end": window.end,
                "desiredReplicas": str(window.min),
            },
        }
        for window in given.deployment.spec.scaling.schedules
        if window.min
    ]
