"""The identity of serving pods: one that may do nothing, and whose token is never mounted.

It is there also where the spec names another: while a rollout waits, pods of the former template may have to be made.
"""

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
        annotations=given.deployment.spec.children.service_account.annotations,
        automountServiceAccountToken=False,
    )
