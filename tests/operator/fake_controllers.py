"""What Kubernetes' own controllers and kubelets would do to the objects in a `FakeKube`, step by step."""

import copy

from fake_kube import FakeKube

from quire_contract import names
from quire_contract.model_facts import ModelFacts, encode_facts
from quire_kube.objects import Manifest
from quire_operator.spec.kinds import DEPLOYMENT, JOB, PERSISTENT_VOLUME_CLAIM, POD

FACTS = ModelFacts(path="SmolLM2", bytes=270_000_000, revision="ab12", shape_error="not read in this test")
READY = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}]


def step(kube: FakeKube) -> bool:
    """Let every controller act once; whether any had something to do."""
    before = len(kube.events)
    for claim in kube.of_kind(PERSISTENT_VOLUME_CLAIM):
        _bind(kube, claim)
    for job in kube.of_kind(JOB):
        _run_job(kube, job)
    for deployment in kube.of_kind(DEPLOYMENT):
        _scale(kube, deployment)
    return len(kube.events) > before


def _bind(kube: FakeKube, claim: Manifest) -> None:
    requests = claim["spec"]["resources"]["requests"]
    kube.put({**claim, "status": {"phase": "Bound", "capacity": requests}})


def _run_job(kube: FakeKube, job: Manifest) -> None:
    if (job.get("status") or {}).get("succeeded"):
        return
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    state = {"exitCode": 0, "reason": "Completed", "message": encode_facts(FACTS).decode()}
    pod = _pod(f"{name}-x", job, job["spec"]["template"])
    pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] = name
    container = pod["spec"]["containers"][0]["name"]
    pod["status"] = {
        "phase": "Succeeded",
        "containerStatuses": [{"name": container, "restartCount": 0, "state": {"terminated": state}}],
    }
    kube.put(pod)
    done = {"type": "Complete", "status": "True", "lastTransitionTime": kube.now_text}
    kube.put({**job, "status": {"succeeded": 1, "startTime": kube.now_text, "conditions": [done]}})
    assert namespace == pod["metadata"]["namespace"]


def _scale(kube: FakeKube, deployment: Manifest) -> None:
    """One ready pod of the newest template for each replica, at once."""
    name, template = deployment["metadata"]["name"], deployment["spec"]["template"]
    revision = template["metadata"]["labels"].get(names.LABEL_REVISION, "")
    wanted = {f"{name}-{revision[:6]}-{i}" for i in range(deployment["spec"].get("replicas", 1))}
    uid = deployment["metadata"]["uid"]
    pods = {p["metadata"]["name"]: p for p in kube.of_kind(POD) if _is_owned_by(p, uid)}
    for pod_name in sorted(set(pods) - wanted):
        pod = pods[pod_name]
        kube.remove(next(ref for ref in kube.objects if ref.kind == POD and ref.name == pod["metadata"]["name"]))
    for pod_name in sorted(wanted - set(pods)):
        pod = _pod(pod_name, deployment, template)
        container = pod["spec"]["containers"][0]["name"]
        running = {"running": {"startedAt": kube.now_text}}
        pod["status"] = {
            "phase": "Running",
            "podIP": "10.0.0.9",
            "startTime": kube.now_text,
            "conditions": [{**condition, "lastTransitionTime": kube.now_text} for condition in READY],
            "containerStatuses": [
                {"name": container, "ready": True, "started": True, "restartCount": 0, "state": running}
            ],
        }
        kube.put(pod)
    num = len(wanted)
    counts = {"replicas": num, "readyReplicas": num, "updatedReplicas": num, "availableReplicas": num}
    conditions = [{"type": "Available", "status": "True"}, {"type": "Progressing", "status": "True"}]
    generation = deployment["metadata"]["generation"]
    kube.put({**deployment, "status": {**counts, "observedGeneration": generation, "conditions": conditions}})


def _pod(name: str, owner: Manifest, template: Manifest) -> Manifest:
    controller = {key: owner[key] for key in ("apiVersion", "kind")}
    controller |= {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"], "controller": True}
    metadata = copy.deepcopy(template["metadata"])
    metadata |= {"name": name, "namespace": owner["metadata"]["namespace"], "ownerReferences": [controller]}
    spec = {**copy.deepcopy(template["spec"]), "nodeName": "node-1"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _is_owned_by(pod: Manifest, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences") or ())
