"""Whom a Service leads to: the pods in which a client of it ends up.

Answers as Kubernetes' EndpointSlice controller does, from the same two things: the Service's selector and ports, and
the pods that are ready. Both are watched anyway, while the slices would be two more objects for each model that change
with every pod. Knows no LLMDeployment, only on which port its clients call and on which its servers listen.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from quire_contract import ports
from quire_kube.objects import Manifest
from quire_operator.watch.pods import is_ending, is_ready

_HEADLESS: Final = "None"
"""Of a Service that only names its pods: a client's port is then the pod's own."""


def reached_pods(service: Manifest | None, pods: Iterable[Manifest]) -> tuple[Manifest, ...]:
    """Return the pods that answer the clients of a Service; none where it is not there, or on its way out."""
    if service is None or is_ending(service):
        return ()
    return tuple(pod for pod in pods if is_ready(pod) and not is_ending(pod) and _leads_to(service, pod))


def _leads_to(service: Manifest, pod: Manifest) -> bool:
    spec: Mapping[str, Any] = service.get("spec") or {}
    selector: Mapping[str, str] = spec.get("selector") or {}
    labels: Mapping[str, str] = pod["metadata"].get("labels") or {}
    is_forwarding = spec.get("type") != "ExternalName" and spec.get("clusterIP") != _HEADLESS
    if not is_forwarding or not selector or not selector.items() <= labels.items():
        return False
    return ports.SERVER_HTTP in _target_ports(spec, pod)


def _target_ports(spec: Mapping[str, Any], pod: Manifest) -> Iterator[int]:
    """Yield where in the pod the clients' port leads: nowhere, if no container has a port of its name."""
    for port in spec.get("ports") or ():
        if port.get("port") != ports.SERVICE_HTTP or port.get("protocol", "TCP") != "TCP":
            continue
        target = port.get("targetPort", port["port"])
        yield from (target,) if isinstance(target, int) else _ports_named(pod, target)


def _ports_named(pod: Manifest, name: str) -> Iterator[int]:
    for container in (pod.get("spec") or {}).get("containers") or ():
        for port in container.get("ports") or ():
            if port.get("name") == name and port.get("protocol", "TCP") == "TCP":
                yield int(port["containerPort"])
