"""The two Services of an LLMDeployment: the one that clients call, and the headless one that names the pods.

`_where_clients_go` alone decides where the first leads.
"""

from quire_contract import names, ports
from quire_kube.objects import Manifest
from quire_operator.plan.hardware import pods_per_replica
from quire_operator.plan.resources.child import build_child
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.spec.kinds import SERVICE, WORKER_INDEX_LABEL

HTTP_PORT_NAME = "http"


def build_service(given: RenderInput) -> Manifest:
    """Build the Service `<name>`: ready pods only."""
    service = given.deployment.spec.children.service
    return build_child(
        given,
        SERVICE,
        names.service_name(given.deployment.name),
        names.COMPONENT_GATEWAY,
        annotations=service.annotations,
        spec={
            "type": service.type,
            "ports": [_port(ports.SERVICE_HTTP)],
            "selector": _where_clients_go(given),
        },
    )


def build_pods_service(given: RenderInput) -> Manifest:
    """Build the Service `<name>-pods`: every answering pod, ready or not, for who asks pods one by one."""
    return build_child(
        given,
        SERVICE,
        names.pods_service_name(given.deployment.name),
        spec={
            "type": "ClusterIP",
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "ports": [_port(ports.SERVER_HTTP)],
            "selector": _answering_pods(given),
        },
    )


def _where_clients_go(given: RenderInput) -> dict[str, str]:
    """Return the labels of the pods that clients reach."""
    return _answering_pods(given)


def _answering_pods(given: RenderInput) -> dict[str, str]:
    labels = names.selector_labels(given.deployment.name)
    if pods_per_replica(given.deployment, given.hardware) > 1:
        labels[WORKER_INDEX_LABEL] = "0"
    return labels


def _port(port: int) -> Manifest:
    return {
        "name": HTTP_PORT_NAME,
        "port": port,
        "protocol": "TCP",
        "appProtocol": "http",
        "targetPort": HTTP_PORT_NAME,
    }
