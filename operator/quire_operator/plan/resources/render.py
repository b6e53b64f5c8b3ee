"""Every object that the operator makes for an LLMDeployment, from decisions that are already made.

Pure: the same input gives the same documents. Each file beside this one builds one kind; this one says which there are.
"""

from quire_kube.objects import Manifest
from quire_operator.plan.hardware import pods_per_replica
from quire_operator.plan.resources.child import with_applied_hash
from quire_operator.plan.resources.download.job import render_download_job
from quire_operator.plan.resources.monitors import build_prometheus_rule, build_service_monitor
from quire_operator.plan.resources.network_policy import build_network_policy
from quire_operator.plan.resources.pdb import build_pod_disruption_budget
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.plan.resources.scaled_object import build_scaled_object
from quire_operator.plan.resources.service_account import build_service_account
from quire_operator.plan.resources.services import build_pods_service, build_service
from quire_operator.plan.resources.volume import render_volume
from quire_operator.plan.resources.workload.deployment import build_deployment
from quire_operator.plan.resources.workload.leader_worker_set import build_leader_worker_set
from quire_operator.plan.resources.workload.revision import template_revision, with_revision

__all__ = ["render_children", "render_download_job", "render_volume", "template_revision"]


def render_children(given: RenderInput) -> tuple[Manifest, ...]:
    """Return all objects that the LLMDeployment owns, in the order in which to apply them: the workload last.

    There is no workload while the model is not in its volume (`facts` unknown beside a claim).

    Raises:
        SpecError: `spec.podTemplate` cannot be merged, or the devices cannot be dealt out to pods.
    """
    children = (
        build_service_account(given),
        build_service(given),
        build_pods_service(given),
        build_network_policy(given),
        build_pod_disruption_budget(given),
        build_scaled_object(given),
        build_service_monitor(given),
        build_prometheus_rule(given),
        _build_workload(given),
    )
    return tuple(with_applied_hash(child) for child in children if child is not None)


def _build_workload(given: RenderInput) -> Manifest | None:
    if given.claim is not None and given.facts is None:
        return None
    is_several = pods_per_replica(given.deployment, given.hardware) > 1
    return with_revision(build_leader_worker_set(given) if is_several else build_deployment(given))
