"""`spec.podTemplate` merges as `kubectl patch --type=strategic` does, but where `workload/merge.py` is kinder."""

import json
from typing import Any

import pytest
from support.kubectl import run

from quire_operator.plan.resources.workload.merge import MERGE_KEYS, item_key, merge_strategically

SERVER = {
    "name": "server",
    "image": "server",
    "args": ["serve", "/models"],
    "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
    "ports": [{"name": "http", "containerPort": 8000, "protocol": "TCP"}],
    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "model", "mountPath": "/models", "readOnly": True}],
    "readinessProbe": {"httpGet": {"path": "/readyz", "port": "http"}, "periodSeconds": 2},
    "resources": {"limits": {"cpu": "2", "memory": "2Gi"}},
}
TEMPLATE = {
    "metadata": {"labels": {"app": "quire"}},
    "spec": {
        "containers": [SERVER],
        "imagePullSecrets": [{"name": "registry"}],
        "securityContext": {"runAsUser": 65532, "runAsNonRoot": True, "supplementalGroups": [1, 2]},
        "terminationGracePeriodSeconds": 145,
        "topologySpreadConstraints": [
            {"topologyKey": "kubernetes.io/hostname", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "model", "persistentVolumeClaim": {"claimName": "m"}}],
    },
}
SERVER_PATCHES: list[dict[str, Any]] = [
    {"image": "other", "args": ["serve"]},
    {"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]},
    {"env": [{"name": "A", "$patch": "delete"}]},
    {"env": [{"$patch": "replace"}, {"name": "C", "value": "4"}]},
    {"env": []},
    {"env": None},
    {"ports": [{"containerPort": 8000, "hostPort": 80}, {"containerPort": 9000, "name": "metrics"}]},
    {"volumeMounts": [{"mountPath": "/tmp", "name": "tmp", "subPath": "x"}, {"mountPath": "/data", "name": "tmp"}]},
    {"resources": {"limits": {"cpu": None, "nvidia.com/gpu": "1"}}},
    {"resources": {"$patch": "replace", "requests": {"cpu": "1"}}},
    {"readinessProbe": {"periodSeconds": 9}},
    {"readinessProbe": {"$patch": "delete"}},
    {"readinessProbe": {"httpGet": {"port": 9}, "failureThreshold": 7}},
    {"lifecycle": {"preStop": {"exec": {"command": ["sleep", "1"]}}}},
]
SPEC_PATCHES: list[dict[str, Any]] = [
    {"containers": [{"name": "sidecar", "image": "x", "env": [{"name": "A", "value": "9"}]}]},
    {"containers": [{"$patch": "replace"}, {"name": "only", "image": "x"}]},
    {"containers": [{"name": "server", "$patch": "delete"}, {"name": "sidecar", "image": "x"}]},
    {"initContainers": [{"name": "first", "image": "x"}]},
    {"imagePullSecrets": [{"name": "another"}, {"name": "registry"}]},
    {"securityContext": {"runAsUser": None, "fsGroup": 7, "supplementalGroups": [3]}},
    {"securityContext": {"$deleteFromPrimitiveList/supplementalGroups": [1]}},
    {"topologySpreadConstraints": [{"topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"}]},
    {"topologySpreadConstraints": [{"$patch": "replace"}, {"topologyKey": "zone", "maxSkew": 2}]},
    {"volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "logs", "emptyDir": {}}]},
    {"volumes": [{"name": "tmp", "$patch": "delete"}]},
    {"hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a"]}], "nodeSelector": {"zone": "a"}, "hostNetwork": True},
    {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}]}}},
    {"terminationGracePeriodSeconds": None},
]
PATCHES = [
    *({"spec": {"containers": [{"name": "server", **patch}]}} for patch in SERVER_PATCHES),
    *({"spec": patch} for patch in SPEC_PATCHES),
    {"metadata": {"labels": {"team": "search"}, "annotations": {"a": "b"}}},
    {"metadata": {"labels": {"$patch": "replace", "only": "this"}}},
    {"metadata": None},
]


def normalised(value: Any, field: str = "") -> Any:
    """Sort lists that have a merge key, whose order means nothing, and leave out what is empty."""
    if isinstance(value, dict):
        found = {key: normalised(child, key) for key, child in value.items()}
        return {key: child for key, child in found.items() if child not in (None, {}, [])}
    if isinstance(value, list):
        items = [normalised(item) for item in value]
        return sorted(items, key=lambda item: repr(item_key(item, MERGE_KEYS[field]))) if field in MERGE_KEYS else items
    return value


@pytest.mark.parametrize("patch", PATCHES, ids=json.dumps)
def test_a_patch_gives_what_kubectl_makes_of_it(patch: dict[str, Any]) -> None:
    document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": TEMPLATE}
    words = ("patch", "--local", "--type=strategic", "-f", "-", "-p", json.dumps({"template": patch}), "-o", "json")
    theirs = json.loads(run(["kubectl", *words], stdin=json.dumps(document)))["template"]
    assert normalised(merge_strategically(TEMPLATE, patch, "p")) == normalised(theirs)
