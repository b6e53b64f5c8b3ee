"""The revision of a workload: a digest of what its pods are made from.

Two workloads with one revision have pods that serve alike, so nothing needs to roll out between them.
"""

from quire_contract import names
from quire_kube.objects import Manifest
from quire_operator.plan.hardware import CONTAINER
from quire_operator.plan.resources.child import digest
from quire_operator.spec.kinds import pod_templates_of


def template_revision(workload: Manifest) -> str:
    """Return the digest of a rendered workload's pod templates, less their startup budget and the revision itself.

    A live object's digest differs, because the API server adds defaults; its revision is its label LABEL_REVISION.
    """
    return digest([_without_budget(template) for _, template in pod_templates_of(workload)])


def with_revision(workload: Manifest) -> Manifest:
    """Return the workload with LABEL_REVISION on itself and on its pods, and never in its selector."""
    label = {names.LABEL_REVISION: template_revision(workload)}
    for path, _ in pod_templates_of(workload):
        workload = _set_labels(workload, path, label)
    return _set_labels(workload, (), label)


def _without_budget(template: Manifest) -> Manifest:
    metadata, spec = template["metadata"], template["spec"]
    labels = {name: value for name, value in metadata["labels"].items() if name != names.LABEL_REVISION}
    containers = [
        {**container, "startupProbe": {**container["startupProbe"], "failureThreshold": None}}
        if container["name"] == CONTAINER and "startupProbe" in container
        else container
        for container in spec["containers"]
    ]
    return {"metadata": {**metadata, "labels": labels}, "spec": {**spec, "containers": containers}}


def _set_labels(document: Manifest, path: tuple[str, ...], labels: dict[str, str]) -> Manifest:
    if path:
        return {**document, path[0]: _set_labels(document[path[0]], path[1:], labels)}
    metadata = document["metadata"]
    return {**document, "metadata": {**metadata, "labels": {**metadata["labels"], **labels}}}
