"""The identity of serving pods: one that may do nothing, and whose token is never mounted."""

from quire_contract import names
from quire_kube.objects import Manifest
from quire_operator.plan.resources.child import build_child
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.spec.kinds import SERVICE_ACCOUNT


def build_service_account(given: RenderInput) -> Manifest:
    return build_child(
        given,
        SERVICE_ACCOUNT,
        names.workload_name(given.deployment.name),
        automountServiceAccountToken=False,
    )
