"""The cluster of the scale benchmark: an API server without nodes, and what everybody but the operator does there.

An administrator looks and grants rights, users make LLMDeployments, volumes say that they hold their models, and pods
are made and become ready as controllers and kubelets would have it. Measures nothing.
"""

import asyncio
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import common

from quire_contract import names
from quire_contract.model_facts import ModelFacts, encode_facts
from quire_server.models.footprint import shape_of_config

sys.path.insert(0, str(common.ROOT / "e2e"))
from cluster.control_plane import ControlPlane

NAMESPACES = 10
MODELS_PER_NAMESPACE = 5
OPERATOR_USER = f"system:serviceaccount:default:{names.FIELD_MANAGER}"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

Manifest = dict[str, Any]


class Api:
    """The API server, as an administrator asks it."""

    def __init__(self, plane: ControlPlane, session: aiohttp.ClientSession) -> None:
        self._server, self._session = plane.server, session

    async def create(self, path: str, manifest: Manifest) -> None:
        async with self._session.post(self._server + path, json=manifest) as response:
            assert response.status in (200, 201), await response.text()

    async def patch(self, path: str, patch: Manifest) -> Manifest:
        headers = {"Content-Type": "application/merge-patch+json"}
        async with self._session.patch(self._server + path, json=patch, headers=headers) as response:
            assert response.status == 200, await response.text()
            answer: Manifest = await response.json()
            return answer

    async def count_with(self, path: str, column: str) -> int:
        """Count objects whose printed column is not empty, without reading them whole."""
        headers = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io"}
        query = {"resourceVersion": "0", "includeObject": "None"}
        async with self._session.get(self._server + path, params=query, headers=headers) as response:
            assert response.status == 200, await response.text()
            table = await response.json()
        index = [definition["name"] for definition in table["columnDefinitions"]].index(column)
        return sum(bool(row["cells"][index]) for row in table["rows"] or ())

    async def delete(self, path: str) -> None:
        async with self._session.delete(self._server + path, json={"gracePeriodSeconds": 0}) as response:
            assert response.status in (200, 404), await response.text()

    async def items(self, path: str) -> list[Manifest]:
        """Return the operator's objects of a kind, from the API server's memory."""
        query = {"resourceVersion": "0", "labelSelector": f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"}
        async with self._session.get(self._server + path, params=query) as response:
            assert response.status == 200, await response.text()
            answer: Manifest = await response.json()
            return answer["items"] or []

    @asynccontextmanager
    async def watch(self, path: str) -> AsyncIterator[aiohttp.StreamReader]:
        async with self._session.get(self._server + path, params={"watch": "true", "resourceVersion": "0"}) as response:
            yield response.content


@asynccontextmanager
async def connect(plane: ControlPlane) -> AsyncIterator[Api]:
    context = ssl.create_default_context(cafile=str(plane.pki.ca))
    context.load_cert_chain(str(plane.pki.certificate("admin")), str(plane.pki.key("admin")))
    connector = aiohttp.TCPConnector(ssl=context, limit=32)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 22) as session:
        yield Api(plane, session)


def model_uri(index: int) -> str:
    return f"hf://scale/model-{index % MODELS_PER_NAMESPACE}"


def llm_path(namespace: str, name: str = "") -> str:
    return f"/apis/{names.GROUP_VERSION}/namespaces/{namespace}/{names.PLURAL}" + (f"/{name}" if name else "")


async def populate(api: Api, plane: ControlPlane, count: int) -> None:
    """Install the CRD, and create volumes that hold their models and the LLMDeployments that use them."""
    crd = common.ROOT / "crds" / "llmdeployment.yaml"
    plane.admin("apply", "--server-side", "-f", str(crd))
    while not plane.admin.answers("get", names.PLURAL):
        await asyncio.sleep(0.2)
    # Calls are counted here, not rights.
    plane.admin("create", "clusterrolebinding", "operator", "--clusterrole=cluster-admin", f"--user={OPERATOR_USER}")
    for number in range(NAMESPACES):
        namespace = f"scale-{number}"
        await api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        for model in range(MODELS_PER_NAMESPACE):
            claim, path = volume(model_uri(model)), f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
            await api.create(path, claim)
            bound = {"status": {"phase": "Bound", "capacity": claim["spec"]["resources"]["requests"]}}
            await api.patch(f"{path}/{claim['metadata']['name']}/status", bound)
    gate = asyncio.Semaphore(16)

    async def create(index: int) -> None:
        async with gate:
            manifest = llm_deployment(index)
            await api.create(llm_path(f"scale-{index % NAMESPACES}"), manifest)

    await asyncio.gather(*(create(index) for index in range(count)))


def volume(uri: str) -> Manifest:
    digest = names.model_digest(uri)
    shape = shape_of_config(CONFIG)
    facts = ModelFacts(path=f"model-{digest}", bytes=269_000_000, revision="0" * 40, shape=shape)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": names.cache_pvc_name(uri),
            "labels": {names.LABEL_CACHE: digest, names.LABEL_MANAGED_BY: names.MANAGED_BY},
            "annotations": {f"{names.ANNOTATION_FACTS_PREFIX}{digest}": encode_facts(facts).decode()},
        },
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "16Gi"}}},
    }


def llm_deployment(index: int) -> Manifest:
    return {
        "apiVersion": names.GROUP_VERSION,
        "kind": names.KIND,
        "metadata": {"name": f"llm-{index}"},
        "spec": {
            "model": {"uri": model_uri(index // NAMESPACES)},
            "resources": {"limits": {"cpu": 2, "memory": "4Gi"}},
            "engine": {"maxModelLen": 2048},
            "rollout": {"waitForIdle": "0s"},  # there is no server to ask whether it is idle
        },
    }


async def run_pods(api: Api) -> None:
    """Let each Deployment have a ready pod of its newest template, and none of another."""
    found: dict[tuple[str, str], list[Manifest]] = {}
    for pod in await api.items("/api/v1/pods"):
        owner = pod["metadata"]["namespace"], pod["metadata"]["labels"][names.LABEL_DEPLOYMENT]
        found.setdefault(owner, []).append(pod)
    gate = asyncio.Semaphore(16)

    async def run(deployment: Manifest) -> None:
        metadata, template = deployment["metadata"], deployment["spec"]["template"]
        namespace, name = metadata["namespace"], metadata["name"]
        revision = template["metadata"]["labels"][names.LABEL_REVISION]
        pods = {pod["metadata"]["name"] for pod in found.get((namespace, name), ())}
        wanted = f"{name}-{revision}"
        path = f"/api/v1/namespaces/{namespace}/pods"
        async with gate:
            if wanted not in pods:
                manifest = {"metadata": {**template["metadata"], "name": wanted}, "spec": template["spec"]}
                await api.create(path, manifest)
                await api.patch(f"{path}/{wanted}/status", {"status": ready_pod_status()})
            for old in pods - {wanted}:
                await api.delete(f"{path}/{old}")
            status = ready_deployment_status(metadata["generation"])
            deployment_path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}/status"
            await api.patch(deployment_path, {"status": status})

    await asyncio.gather(*(run(deployment) for deployment in await api.items("/apis/apps/v1/deployments")))


def ready_pod_status() -> Manifest:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    types = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    server = {
        "name": "server",
        "image": "quire/server-cpu",
        "imageID": "",
        "ready": True,
        "started": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": now}},
    }
    return {
        "phase": "Running",
        "podIP": "127.0.0.1",
        "startTime": now,
        "conditions": [{"type": type_, "status": "True", "lastTransitionTime": now} for type_ in types],
        "containerStatuses": [server],
    }


def ready_deployment_status(generation: int) -> Manifest:
    conditions = [
        {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"},
        {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
    ]
    counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 1)
    return {"observedGeneration": generation, **counts, "conditions": conditions}
