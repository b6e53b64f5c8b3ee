"""How many serving pods a drain of nodes may take at once."""

from quire_contract import names
from quire_kube.objects import Manifest
from quire_operator.plan.resources.child import build_child
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.spec.kinds import POD_DISRUPTION_BUDGET


def build_pod_disruption_budget(given: RenderInput) -> Manifest:
    """Let one pod go at a time, a single replica too: a budget that keeps a node from draining gets deleted by hand."""
    return build_child(
        given,
        POD_DISRUPTION_BUDGET,
        names.workload_name(given.deployment.name),
        spec={
            "maxUnavailable": 1,
            "selector": {"matchLabels": names.selector_labels(given.deployment.name)},
            # A pod that serves nobody (loading, crashing) must not hold up a node either.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    )
