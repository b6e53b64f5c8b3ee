"""Objects as a cluster holds them, for the tests of status; and how a status is derived and looked at there."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jsonschema

from quire_contract.crd import load_schema
from quire_contract.memory.fit import FitReport
from quire_contract.model_facts import ModelFacts
from quire_contract.names import LABEL_REVISION
from quire_contract.termination import TerminationMessage, encode_termination
from quire_kube.objects import Manifest, Ref
from quire_operator.plan.actions import Plan, Verdict
from quire_operator.spec.kinds import DEPLOYMENT, SERVICE
from quire_operator.spec.schema import find_problems
from quire_operator.spec.settings import Settings
from quire_operator.status.status import derive_status
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed

NOW = 1_763_722_800.0
LATER = NOW + 3600.0
TIME = "2025-11-21T11:00:00Z"
NAME, NAMESPACE = "smollm2", "ai"
STATUS_SCHEMA = load_schema()["properties"]["status"]
FACTS = ModelFacts(path="hf/org/model", bytes=1 << 30, revision="c0ffee")
FIT = FitReport(
    fits=True,
    need_bytes=5,
    have_bytes=9,
    weights_bytes=3,
    workspace_bytes=1,
    kv_bytes_per_token=1,
    kv_capacity_tokens=4,
    max_concurrent_sequences=2,
    max_model_len=4,
)
YES = Verdict(holds=True, reason="Yes", message="It is so.")
GPU_MESSAGE = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


def build_manifest(spec: dict[str, Any] | None = None, status: dict[str, Any] | None = None) -> Manifest:
    return {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": NAME, "namespace": NAMESPACE, "uid": "llm-uid", "generation": 3, "resourceVersion": "7"},
        "spec": {"model": {"uri": "hf://org/model"}} | (spec or {}),
        **({"status": status} if status is not None else {}),
    }


def build_plan(**changes: Any) -> Plan:
    base = Plan(
        accepted=YES,
        model_cached=YES,
        fits=YES,
        autoscaling=Verdict(holds=False, reason="NoGateway", message="Replicas stay as spec.replicas says."),
        replicas=1,
        facts=FACTS,
        fit=FIT,
        revision="new",
    )
    return replace(base, **changes)


DOWNLOADING: Mapping[str, Any] = {
    "model_cached": Verdict(holds=False, reason="Downloading", message="hf://org/model is being downloaded."),
    "fits": Verdict(holds=None, reason="ModelUnknown", message="The model's files are not there yet."),
    "facts": None,
    "fit": None,
    "revision": None,
}


def build_condition(type_: str, status: str, reason: str = "", message: str = "") -> dict[str, Any]:
    return {"type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": TIME}


def build_pod(name: str = "pod-a", *, revision: str = "new", ready: bool = False, **container: Any) -> Manifest:
    """Build a pod whose server runs, unless `container` says otherwise."""
    state = {"running": {"startedAt": TIME}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": f"uid-{name}",
            "creationTimestamp": TIME,
            "labels": {LABEL_REVISION: revision, "quire.dev/deployment": NAME},
        },
        "spec": {
            "nodeName": "node-1",
            "containers": [
                {
                    "name": "server",
                    "image": "i",
                    "resources": {"limits": {"memory": "2Gi"}},
                    "ports": [{"name": "http", "containerPort": 8000, "protocol": "TCP"}],
                }
            ],
        },
        "status": {
            "phase": "Running",
            "conditions": [
                build_condition("PodScheduled", "True"),
                build_condition("Ready", "True" if ready else "False"),
            ],
            "containerStatuses": [
                {"name": "server", "image": "i", "ready": ready, "restartCount": 0, "state": state, "lastState": {}}
                | container
            ],
        },
    }


def unschedulable(name: str = "pod-a", *, revision: str = "new") -> Manifest:
    pod = build_pod(name, revision=revision)
    pod["spec"]["nodeName"] = None
    pod["status"] = {
        "phase": "Pending",
        "conditions": [build_condition("PodScheduled", "False", "Unschedulable", GPU_MESSAGE)],
    }
    return pod


def pulling(name: str = "pod-a", *, revision: str = "new") -> Manifest:
    message = 'Back-off pulling image "i": ErrImagePull: i: not found'
    pod = build_pod(name, revision=revision, state={"waiting": {"reason": "ImagePullBackOff", "message": message}})
    pod["status"]["phase"] = "Pending"
    return pod


def ending(pod: Manifest) -> Manifest:
    return {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": TIME}}


def ended(message: str = "", *, reason: str = "Error", exit_code: int = 1) -> dict[str, Any]:
    return {"terminated": {"exitCode": exit_code, "reason": reason, "message": message}}


def build_workload(
    *conditions: dict[str, Any], revision: str = "new", replicas: int = 1, generation: int = 1, **status: Any
) -> Manifest:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": NAME,
            "namespace": NAMESPACE,
            "generation": generation,
            "labels": {LABEL_REVISION: revision},
        },
        "spec": {"replicas": replicas},
        "status": {"observedGeneration": generation, "conditions": list(conditions), **status},
    }


def rolled_out(replicas: int = 1) -> Manifest:
    done = build_condition("Progressing", "True", "NewReplicaSetAvailable")
    return build_workload(done, replicas=replicas, updatedReplicas=replicas, readyReplicas=replicas)


def build_service(name: str = NAME, **spec: Any) -> Manifest:
    """Build the Service that clients call, unless `name` and `spec` say otherwise."""
    port = {"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}
    ours = {"type": "ClusterIP", "selector": {"quire.dev/deployment": NAME}, "ports": [port]}
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": ours | spec}


def build_observed(
    *pods: Manifest, workload: Manifest | None = None, manifest: Manifest | None = None, **fields: Any
) -> Observed:
    children = {Ref(kind=SERVICE, namespace=NAMESPACE, name=NAME): build_service()}
    if workload is not None:
        children[Ref(kind=DEPLOYMENT, namespace=NAMESPACE, name=NAME)] = workload
    if fields.get("job_pods"):
        fields.setdefault("job", {"metadata": {"name": "job", "uid": "job-uid"}})
    return Observed(manifest=manifest or build_manifest(), children=children, pods=pods, **fields)


def derive(
    observed: Observed, plan: Plan | None = None, *, gateway: bool = False, now: float = NOW, cluster: Any = None
) -> dict[str, Any]:
    settings = Settings(routes_through_gateway=gateway)
    return derive_status(observed, plan or build_plan(), cluster or ClusterFacts(), settings, now)


def shown_condition(status: Mapping[str, Any], type_: str) -> tuple[str, str]:
    (found,) = (condition for condition in status["conditions"] if condition["type"] == type_)
    return found["status"], found["reason"]


def check(status: dict[str, Any]) -> None:
    """Hold a status to the CRD, which would also drop what it does not know."""
    jsonschema.validate(status, STATUS_SCHEMA)
    assert [str(problem) for problem in find_problems(status, STATUS_SCHEMA, "status")] == []


def look(observed: Observed, plan: Plan | None = None, **options: Any) -> tuple[str, str, tuple[str, str]]:
    """Return phase, reason, and Ready."""
    status = derive(observed, plan, **options)
    check(status)
    return status["phase"], status["reason"], shown_condition(status, "Ready")


CRASH = "Traceback (most recent call last):\n  File x\nValueError: bad flag\n"
TOO_BIG = encode_termination(
    TerminationMessage(
        code="OutOfMemory", stage="Loading", message="", need_bytes=int(17.1 * 2**30), have_bytes=15 * 2**30
    )
).decode()
BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}}


def refused_plan(field: str, reason: str, message: str) -> Plan:
    """Build a plan in which one verdict is no, and no pods are wanted yet."""
    changes = dict(DOWNLOADING) if field == "model_cached" else {"revision": None}
    return build_plan(**{**changes, field: Verdict(holds=False, reason=reason, message=message)})
