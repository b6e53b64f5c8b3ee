"""The workload where one pod is one replica."""

from typing import Final

from quire_contract import names
from quire_kube.objects import Manifest
from quire_operator.plan.resources.child import build_child, whole_seconds
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.plan.resources.workload.pod import build_pod_template
from quire_operator.spec.kinds import DEPLOYMENT

PULL_BUDGET_S: Final = 600
"""For scheduling a pod and pulling its image, before the load budget begins."""


def build_deployment(given: RenderInput) -> Manifest:
    """Build the Deployment, without its revision.

    Raises:
        SpecError: `spec.podTemplate` cannot be merged.
    """
    deployment = given.deployment
    rollout = deployment.spec.rollout
    deadline_s = rollout.progress_deadline_s
    is_surge = rollout.strategy == "Surge"
    return build_child(
        given,
        DEPLOYMENT,
        names.workload_name(deployment.name),
        annotations={names.ANNOTATION_LOAD_BUDGET: str(whole_seconds(given.load_budget_s))},
        spec={
            "replicas": given.replicas,
            "selector": {"matchLabels": names.selector_labels(deployment.name)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": int(is_surge), "maxUnavailable": int(not is_surge)},
            },
            "progressDeadlineSeconds": max(whole_seconds(deadline_s or given.load_budget_s + PULL_BUDGET_S), 1),
            "revisionHistoryLimit": 2,
            "template": build_pod_template(given),
        },
    )
