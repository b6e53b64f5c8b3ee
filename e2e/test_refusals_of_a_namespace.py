"""What a real API server says where a namespace has a quota or a LimitRange, and that the operator understands it."""

from typing import Any

import pytest
from support.kubectl import Kubectl, wait_for

from quire_operator.plan.admission import (
    LIMIT_RANGE,
    QUOTA_EXCEEDED,
    QUOTA_NEEDS_RESOURCES,
    Subject,
    read_refusal,
)

Document = dict[str, Any]


def quota(**hard: str) -> Document:
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"}, "spec": {"hard": hard}}


def limit_range(**limits: Any) -> Document:
    return {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": {"limits": [limits]}}


def claim(size: str) -> Document:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "quire-cache-1"}, "spec": spec}


def pod_spec(limits: dict[str, str]) -> Document:
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {"name": "server", "image": "x", "resources": {"limits": limits}, "securityContext": security}
    return {"restartPolicy": "Never", "containers": [container]}


def pod(**limits: str) -> Document:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "m-12345-x"}, "spec": pod_spec(limits)}


def job() -> Document:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "quire-download-1"},
        "spec": {"template": {"spec": pod_spec({})}},
    }


def deployment() -> Document:
    labels = {"a": "b"}
    template = {"metadata": {"labels": labels}, "spec": {**pod_spec({}), "restartPolicy": "Always"}}
    spec = {"selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "smollm2"}, "spec": spec}


CASES: list[tuple[Document, Document, Subject, str, str]] = [
    (quota(**{"requests.storage": "1Gi"}), claim("9Gi"), Subject.CLAIM, QUOTA_EXCEEDED, "lower spec.cache.size"),
    (quota(persistentvolumeclaims="0"), claim("1Gi"), Subject.CLAIM, QUOTA_EXCEEDED, "persistentvolumeclaims"),
    (quota(**{"count/jobs.batch": "0"}), job(), Subject.DOWNLOAD, QUOTA_EXCEEDED, "delete jobs that nobody needs"),
    (quota(**{"count/deployments.apps": "0"}), deployment(), Subject.SERVER, QUOTA_EXCEEDED, "delete deployments that"),
    (quota(pods="0"), pod(), Subject.SERVER, QUOTA_EXCEEDED, "delete pods that nobody needs"),
    (quota(**{"limits.cpu": "1"}), pod(cpu="2"), Subject.SERVER, QUOTA_EXCEEDED, "lower spec.resources"),
    (quota(**{"limits.cpu": "1", "limits.memory": "1Gi"}), pod(), Subject.SERVER, QUOTA_NEEDS_RESOURCES,
     "set limits.cpu and limits.memory in spec.resources"),
    (limit_range(type="Container", max={"memory": "1Gi"}), pod(memory="2Gi"), Subject.SERVER, LIMIT_RANGE,
     "limit is 2Gi; bring spec.resources within it"),
    (limit_range(type="Container", min={"memory": "1Gi"}), pod(memory="1Mi"), Subject.SERVER, LIMIT_RANGE,
     "minimum memory usage per Container is 1Gi"),
    (limit_range(type="Pod", max={"cpu": "1", "memory": "1Gi"}), pod(cpu="2", memory="2Gi"), Subject.SERVER,
     LIMIT_RANGE, "per Pod is 1"),
    (limit_range(type="PersistentVolumeClaim", max={"storage": "1Gi"}), claim("9Gi"), Subject.CLAIM, LIMIT_RANGE,
     "request is 9Gi; bring spec.cache.size within it"),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "document", "subject", "reason", "said"), CASES)
def test_a_refusal_is_understood(
    restricted: Kubectl, policy: Document, document: Document, subject: Subject, reason: str, said: str
) -> None:
    restricted.apply(policy)
    wait_for("its ServiceAccount", lambda: restricted.get("serviceaccount", "default"), timeout_s=30)
    if policy["kind"] == "ResourceQuota":  # until it is counted, all is refused for that
        wait_for("a counted quota", lambda: is_counted(restricted), timeout_s=30)
    text = restricted.refuse(document)
    print(text)
    found = read_refusal(text, subject)
    assert found is not None, text
    assert (found.reason, document["metadata"]["name"] in found.detail) == (reason, False), found
    assert said in found.detail


def is_counted(kubectl: Kubectl) -> bool:
    found = kubectl.get("resourcequota", "small")
    return found is not None and "used" in found.get("status", {})
