"""The kinds of Kubernetes objects that the operator deals in, by name, and where they hold pod templates. Pure data."""

from collections.abc import Iterator
from typing import Final

from quire_contract import names
from quire_kube.objects import Kind, Manifest, Ref

LLM_DEPLOYMENT: Final = Kind(api_version=names.GROUP_VERSION, kind=names.KIND, plural=names.PLURAL)
POD: Final = Kind(api_version="v1", kind="Pod", plural="pods")
SERVICE: Final = Kind(api_version="v1", kind="Service", plural="services")
SERVICE_ACCOUNT: Final = Kind(api_version="v1", kind="ServiceAccount", plural="serviceaccounts")
PERSISTENT_VOLUME_CLAIM: Final = Kind(api_version="v1", kind="PersistentVolumeClaim", plural="persistentvolumeclaims")
EVENT: Final = Kind(api_version="v1", kind="Event", plural="events")
JOB: Final = Kind(api_version="batch/v1", kind="Job", plural="jobs")
DEPLOYMENT: Final = Kind(api_version="apps/v1", kind="Deployment", plural="deployments")
POD_DISRUPTION_BUDGET: Final = Kind(api_version="policy/v1", kind="PodDisruptionBudget", plural="poddisruptionbudgets")
NETWORK_POLICY: Final = Kind(api_version="networking.k8s.io/v1", kind="NetworkPolicy", plural="networkpolicies")
STORAGE_CLASS: Final = Kind(
    api_version="storage.k8s.io/v1", kind="StorageClass", plural="storageclasses", is_namespaced=False
)
LEASE: Final = Kind(api_version="coordination.k8s.io/v1", kind="Lease", plural="leases")
LEADER_WORKER_SET: Final = Kind(
    api_version="leaderworkerset.x-k8s.io/v1", kind="LeaderWorkerSet", plural="leaderworkersets"
)
WORKER_INDEX_LABEL: Final = "leaderworkerset.sigs.k8s.io/worker-index"
"""On every pod of a LeaderWorkerSet; "0" is the leader, which alone answers requests."""
SCALED_OBJECT: Final = Kind(api_version="keda.sh/v1alpha1", kind="ScaledObject", plural="scaledobjects")
SERVICE_MONITOR: Final = Kind(api_version="monitoring.coreos.com/v1", kind="ServiceMonitor", plural="servicemonitors")
PROMETHEUS_RULE: Final = Kind(api_version="monitoring.coreos.com/v1", kind="PrometheusRule", plural="prometheusrules")

OWNED_KINDS: Final = (
    SERVICE_ACCOUNT,
    SERVICE,
    DEPLOYMENT,
    POD_DISRUPTION_BUDGET,
    NETWORK_POLICY,
    LEADER_WORKER_SET,
    SCALED_OBJECT,
    SERVICE_MONITOR,
    PROMETHEUS_RULE,
)
"""Kinds of children that carry an owner reference; what of these is no longer desired is pruned."""

WORKLOAD_KINDS: Final = (DEPLOYMENT, LEADER_WORKER_SET)
"""Kinds that make the pods, by templates which users merge into."""

POD_TEMPLATES: Final = (
    ("spec", "template"),
    ("spec", "leaderWorkerTemplate", "leaderTemplate"),
    ("spec", "leaderWorkerTemplate", "workerTemplate"),
)
"""Where a workload has them."""

SHARED_KINDS: Final = (PERSISTENT_VOLUME_CLAIM, JOB)
"""Kinds that all LLMDeployments of one model share; nobody owns them."""

OPTIONAL_KINDS: Final = (LEADER_WORKER_SET, SCALED_OBJECT, SERVICE_MONITOR, PROMETHEUS_RULE)
"""Kinds that a cluster may not have."""

_BY_NAME: Final = {
    (kind.api_version, kind.kind): kind
    for kind in (LLM_DEPLOYMENT, POD, EVENT, STORAGE_CLASS, LEASE, *OWNED_KINDS, *SHARED_KINDS)
}


def ref_of(manifest: Manifest) -> Ref:
    """Return what an object is called. Its kind must be one of those above."""
    metadata = manifest["metadata"]
    kind = _BY_NAME[manifest["apiVersion"], manifest["kind"]]
    return Ref(kind=kind, namespace=metadata.get("namespace", ""), name=metadata["name"])


def pod_templates_of(workload: Manifest) -> Iterator[tuple[tuple[str, ...], Manifest]]:
    """Yield where each pod template of a workload is, and the template."""
    for path in POD_TEMPLATES:
        found: Manifest | None = workload
        for key in path:
            found = (found or {}).get(key)
        if found is not None:
            yield path, found
