"""Names, labels and annotations of everything that Quire puts into a cluster.

Knows no objects, only what they are called. Every child's name is a pure function of its LLMDeployment's name, or of
the model's URI and revision where the object is shared. No function here returns more than 63 characters for a name of
at most `MAX_NAME_LENGTH`, because names become DNS labels and label values.
"""

import hashlib
from typing import Final

API_GROUP: Final = "quire.dev"
API_VERSION: Final = "v1alpha1"
GROUP_VERSION: Final = f"{API_GROUP}/{API_VERSION}"
KIND: Final = "LLMDeployment"
PLURAL: Final = "llmdeployments"
SINGULAR: Final = "llmdeployment"
SHORT_NAME: Final = "llm"
CRD_NAME: Final = f"{PLURAL}.{API_GROUP}"

FIELD_MANAGER: Final = "quire-operator"
SYSTEM_NAMESPACE: Final = "quire-system"
OPERATOR_LEASE: Final = "quire-operator"
GATEWAY_SERVICE: Final = "quire-gateway"

MAX_NAME_LENGTH: Final = 45
"""A Deployment's pods are called `<name>-<10 characters>-<5 characters>`, and a host name has at most 63: 45 + 17."""

# Labels that every tool reads (https://kubernetes.io/docs/concepts/overview/working-with-objects/common-labels/).
LABEL_NAME: Final = "app.kubernetes.io/name"
LABEL_INSTANCE: Final = "app.kubernetes.io/instance"
LABEL_COMPONENT: Final = "app.kubernetes.io/component"
LABEL_PART_OF: Final = "app.kubernetes.io/part-of"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
LABEL_VERSION: Final = "app.kubernetes.io/version"

APP_NAME: Final = "quire"
MANAGED_BY: Final = "quire-operator"
COMPONENT_SERVER: Final = "server"
COMPONENT_CACHE: Final = "cache"
COMPONENT_DOWNLOAD: Final = "download"
COMPONENT_GATEWAY: Final = "gateway"
COMPONENT_OPERATOR: Final = "operator"

# Our own labels: what the operator and the gateway select by.
LABEL_DEPLOYMENT: Final = f"{API_GROUP}/deployment"
"""Name of the LLMDeployment that a child belongs to."""
LABEL_CACHE: Final = f"{API_GROUP}/cache"
"""`model_digest` of what a volume or a download Job holds."""
LABEL_CLAIM: Final = f"{API_GROUP}/claim"
"""On a pod that serves or downloads: `claim_digest` of the PersistentVolumeClaim that it mounts."""
LABEL_REVISION: Final = f"{API_GROUP}/revision"
"""On a workload and its pods: digest of the pod template that the operator rendered."""

# Annotations.
ANNOTATION_APPLIED_HASH: Final = f"{API_GROUP}/applied-hash"
"""Digest of the document last applied: an object that carries the wanted digest is not sent again."""
ANNOTATION_FACTS_PREFIX: Final = f"model.{API_GROUP}/"
"""Followed by `model_digest`: the `ModelFacts` of a model that a volume holds, as JSON."""
ANNOTATION_LOAD_BUDGET: Final = f"{API_GROUP}/load-budget-seconds"
"""On a workload: how long its pods may take to start. Kept while the template is the same, so that learning rolls
nothing out."""
ANNOTATION_ATTEMPT: Final = f"{API_GROUP}/attempt"
"""On a download Job: which try it is, from 1."""
ANNOTATION_PLACEMENT: Final = f"{API_GROUP}/placement"
"""On a download Job: digest of where its pods may run."""
ANNOTATION_ATTEMPT_PREFIX: Final = f"attempt.{API_GROUP}/"
"""On a claim, followed by `model_digest`: the number of the next try, and `ANNOTATION_APPLIED_HASH` of the Job that
failed."""
ANNOTATION_PAUSED: Final = f"{API_GROUP}/paused"
"""On an LLMDeployment, by a person: `true` while nothing of it is to be changed or healed."""
ANNOTATION_RETRY_AT: Final = f"{API_GROUP}/retry-at"
"""On an LLMDeployment, by a person: a time (RFC 3339) from which on a download that has failed is tried again."""
ANNOTATION_MODEL_URI: Final = f"{API_GROUP}/model-uri"
ANNOTATION_MODEL_REVISION: Final = f"{API_GROUP}/model-revision"
ANNOTATION_RETAIN: Final = f"{API_GROUP}/retain"
"""On a cache volume: `false` where it goes when its last user is gone."""
ANNOTATION_UNUSED_SINCE: Final = f"{API_GROUP}/unused-since"
"""On a cache volume that outlived its last user: when that was seen. Empty or absent while it is used."""
ANNOTATION_GROWN_FOR: Final = f"{API_GROUP}/grown-for"
"""On a cache volume: uid of the download's pod that had no space, so that it is grown once for each."""
ANNOTATION_POD_DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"


def model_digest(uri: str, revision: str | None = None) -> str:
    """Return eight hexadecimal digits that stand for a model at a revision (sha256; 2^-32 for any two to collide)."""
    return _short_digest(f"{uri}\0{revision or ''}")


def claim_digest(claim: str) -> str:
    """Return eight hexadecimal digits that stand for a claim, whose name may be too long for a label."""
    return _short_digest(claim)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def workload_name(name: str) -> str:
    """Name the Deployment or LeaderWorkerSet; its budget, its network policy and its ScaledObject have the same."""
    return name


def service_name(name: str) -> str:
    """Name the Service that clients call. It leads to the ready pods, until the gateway takes it over."""
    return name


def pods_service_name(name: str) -> str:
    """Name the headless Service that leads to the pods."""
    return f"{name}-pods"


def cache_pvc_name(uri: str, revision: str | None = None) -> str:
    """Name the volume that every LLMDeployment of this model in the namespace shares."""
    return f"quire-cache-{model_digest(uri, revision)}"


def download_job_name(uri: str, revision: str | None, claim: str) -> str:
    """Name the Job that brings a model into a claim."""
    return f"quire-download-{model_digest(f'{uri} {claim}', revision)}"


def service_host(name: str, namespace: str) -> str:
    """Return the host that clients in the cluster use."""
    return f"{service_name(name)}.{namespace}.svc"


def endpoint(name: str, namespace: str) -> str:
    """Return the base URL for OpenAI clients, as in `status.endpoint`."""
    return f"http://{service_host(name, namespace)}/v1"


def selector_labels(name: str) -> dict[str, str]:
    """Return the labels that select a model's pods. A Deployment's selector is immutable: never add to these."""
    return {LABEL_NAME: APP_NAME, LABEL_COMPONENT: COMPONENT_SERVER, LABEL_DEPLOYMENT: name}


def common_labels(name: str, component: str) -> dict[str, str]:
    """Return the labels of every child of one LLMDeployment."""
    return {
        LABEL_NAME: APP_NAME,
        LABEL_INSTANCE: name,
        LABEL_COMPONENT: component,
        LABEL_PART_OF: APP_NAME,
        LABEL_MANAGED_BY: MANAGED_BY,
        LABEL_DEPLOYMENT: name,
    }


def selector_string(name: str) -> str:
    """Return `selector_labels` as `status.selector` holds it; an autoscaler refuses to work while that is empty."""
    return ",".join(f"{key}={value}" for key, value in sorted(selector_labels(name).items()))
