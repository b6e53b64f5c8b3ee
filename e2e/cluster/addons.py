"""What a cluster has beyond its components: cluster DNS, StorageClasses, RBAC of kube-proxy. Pure: objects as data."""

from collections.abc import Sequence
from typing import Any

COREDNS_IMAGE = "quire.local/coredns:1"
DNS_ADDRESS = "10.96.0.10"
DNS_DOMAIN = "cluster.local"
VOLUME_PROVISIONER = "quire.dev/directory"
GPU_RESOURCE = "nvidia.com/gpu"

_Object = dict[str, Any]


def build_addons(nameservers: Sequence[str]) -> list[_Object]:
    """Return the objects that a fresh cluster gets. Names outside the cluster are asked of the nameservers, if any."""
    return [*_build_dns(nameservers), *build_storage_classes(), _build_proxy_binding()]


def build_storage_classes() -> list[_Object]:
    """Return the classes: `standard` is the default one; the others are file systems whose size is real.

    `sized`: exactly as large as the claim asks, and grows with it. `tiny`: 64 MiB, whatever the claim asks.
    """
    return [
        _build_storage_class("standard", {}, is_default=True),
        _build_storage_class("sized", {"size": "request"}),
        _build_storage_class("tiny", {"size": "64Mi"}),
    ]


def _build_storage_class(name: str, parameters: dict[str, str], *, is_default: bool = False) -> _Object:
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"} if is_default else {}
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name, "annotations": annotations},
        "provisioner": VOLUME_PROVISIONER,
        "parameters": parameters,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
        "allowVolumeExpansion": True,
    }


def _build_proxy_binding() -> _Object:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "quire-cluster:kube-proxy"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:kube-proxy"}],
    }


def _build_dns(nameservers: Sequence[str]) -> list[_Object]:
    metadata = {"name": "coredns", "namespace": "kube-system"}
    role = "system:coredns"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": role},
            "rules": [
                {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": role},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}],
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"Corefile": build_corefile(nameservers)},
        },
        _build_dns_deployment(metadata),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
            "spec": {
                "clusterIP": DNS_ADDRESS,
                "selector": {"k8s-app": "kube-dns"},
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                ],
            },
        },
    ]


def _build_dns_deployment(metadata: _Object) -> _Object:
    labels = {"k8s-app": "kube-dns"}
    container = {
        "name": "coredns",
        "image": COREDNS_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "170Mi"}},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": True}],
    }
    pod = {
        "serviceAccountName": "coredns",
        "dnsPolicy": "Default",
        "priorityClassName": "system-cluster-critical",
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def build_corefile(nameservers: Sequence[str]) -> str:
    """Return CoreDNS's configuration."""
    forward = f"    forward . {' '.join(nameservers)}\n" if nameservers else ""
    return (
        ".:53 {\n    errors\n    health :8080\n    ready :8181\n"
        f"    kubernetes {DNS_DOMAIN} in-addr.arpa ip6.arpa {{\n        pods insecure\n    }}\n"
        f"{forward}    cache 5\n}}\n"
    )
