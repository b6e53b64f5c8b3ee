"""Who may reach serving pods, and what those may reach.

`_clients` alone decides the first. A pod needs nothing from outside: its model is mounted, its token is none. Only the
pods of one replica that spans several talk to one another, and find one another by name.
"""

from quire_contract import names, ports
from quire_kube.objects import Manifest
from quire_operator.plan.hardware import pods_per_replica
from quire_operator.plan.resources.child import build_child
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.spec.kinds import NETWORK_POLICY

_DNS_PORT = 53


def build_network_policy(given: RenderInput) -> Manifest | None:
    """Build the policy; None where `access.networkPolicy` is Open."""
    if given.deployment.spec.access.network_policy == "Open":
        return None
    ingress: list[Manifest] = [{**_clients(given), "ports": [{"port": ports.SERVER_HTTP, "protocol": "TCP"}]}]
    egress: list[Manifest] = []
    pods = {"matchLabels": names.selector_labels(given.deployment.name)}
    if pods_per_replica(given.deployment, given.hardware) > 1:
        peers = [{"podSelector": pods}]
        ingress.append({"from": peers})
        egress.append({"to": peers})
        dns_ports = [{"port": _DNS_PORT, "protocol": protocol} for protocol in ("UDP", "TCP")]
        egress.append({"to": [{"namespaceSelector": {}}], "ports": dns_ports})
    return build_child(
        given,
        NETWORK_POLICY,
        names.workload_name(given.deployment.name),
        spec={
            "podSelector": pods,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    )


def _clients(given: RenderInput) -> Manifest:
    """Return who may send requests: any pod of the cluster, because Services lead to the pods directly.

    What comes through a load balancer or a node's port comes from no pod: there it is anyone.
    """
    if given.deployment.spec.children.service.is_open_to_outside:
        return {}
    return {"from": [{"namespaceSelector": {}}]}
