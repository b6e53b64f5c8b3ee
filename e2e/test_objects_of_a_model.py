"""What a spec says of a model's objects, and of the volume that it is kept in, as a person finds it in the cluster."""

import base64
import json
import urllib.request

from support.hub import GATED_TOKEN
from support.kubectl import Kubectl, Manifest, condition, wait_for
from support.manifests import TINY, llm
from support.traffic import wait_ready

CLAIMS = "app.kubernetes.io/component=cache,app.kubernetes.io/managed-by=quire-operator"
"""The selector that the documents give."""


def account(name: str) -> Manifest:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}


def secret(name: str, **values: str) -> Manifest:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}


def claim_names(kubectl: Kubectl) -> set[str]:
    return {claim["metadata"]["name"] for claim in kubectl.list("pvc", CLAIMS)}


def node_address(kubectl: Kubectl) -> str:
    addresses = kubectl.list("nodes")[0]["status"]["addresses"]
    return str(next(one["address"] for one in addresses if one["type"] == "InternalIP"))


def test_a_download_with_its_own_token_and_account_and_a_service_for_the_outside(kubectl: Kubectl) -> None:
    kubectl.apply(account("reader"), account("server"), secret("hub", HF_TOKEN=GATED_TOKEN))
    dressed = llm(
        "dressed",
        "hf://tiny/gated",
        inheritedMetadata={"labels": {"team": "search"}, "annotations": {"example.com/owner": "ml"}},
        serviceAccount={"name": "server"},
        service={"type": "NodePort", "annotations": {"example.com/internal": "true"}},
        download={
            "envFrom": [{"secretRef": {"name": "hub"}}],
            "serviceAccountName": "reader",
            "labels": {"sidecar.istio.io/inject": "false"},
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
            "securityContext": {"supplementalGroups": [2000]},
        },
    )
    kubectl.apply(dressed)
    wait_ready(kubectl, "dressed")
    (pod,) = kubectl.pods("dressed")
    assert pod["spec"]["serviceAccountName"] == "server"
    assert not [volume for volume in pod["spec"]["volumes"] if "projected" in volume], "no token"
    assert "HF_TOKEN" not in str(pod)
    for kind in ("deployment", "service", "serviceaccount", "networkpolicy", "poddisruptionbudget"):
        assert {one["metadata"]["labels"]["team"] for one in kubectl.list(kind, "quire.dev/deployment=dressed")} == {
            "search"
        }
    service = kubectl.get("service", "dressed")
    assert service is not None
    url = f"http://{node_address(kubectl)}:{service['spec']['ports'][0]['nodePort']}/v1/models"
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["dressed"]

    kubectl.patch("llm", "dressed", {"spec": {"service": None}})

    def is_inside_only() -> bool:
        now = kubectl.get("service", "dressed")
        assert now is not None
        return now["spec"]["type"] == "ClusterIP" and "nodePort" not in now["spec"]["ports"][0]

    wait_for("the node's port goes", is_inside_only, timeout_s=30, describe=kubectl.describe_all)


def test_a_claim_as_asked_by_the_steps_that_the_condition_names(kubectl: Kubectl) -> None:
    kubectl.apply(llm("moved", cache={"size": "2Gi"}))
    wait_ready(kubectl, "moved")
    (claim,) = claim_names(kubectl)
    assert kubectl.llm("moved")["status"]["cache"]["claimName"] == claim
    kubectl.patch("llm", "moved", {"spec": {"cache": {"size": "1Gi"}}})

    def differing() -> str:
        cached = condition(kubectl.llm("moved"), "ModelCached")
        return str(cached["message"]) if (cached["status"], cached["reason"]) == ("True", "ClaimDiffers") else ""

    message = wait_for("ClaimDiffers", differing, timeout_s=30, describe=kubectl.describe_all)
    print(message)
    assert "ClaimDiffers" in {event["reason"] for event in kubectl.events()}
    assert f"set spec.suspend to true, delete PersistentVolumeClaim {claim}, and set spec.suspend to false" in message
    kubectl.patch("llm", "moved", {"spec": {"suspend": True}})
    kubectl("delete", "pvc", claim, "--timeout=60s")
    kubectl.patch("llm", "moved", {"spec": {"suspend": False}})
    wait_ready(kubectl, "moved")
    (anew,) = kubectl.list("pvc", CLAIMS)
    assert anew["spec"]["resources"]["requests"]["storage"] == "1Gi"
    assert condition(kubectl.llm("moved"), "ModelCached")["reason"] == "Cached"


def test_a_changed_model_leaves_a_claim_that_can_be_listed_and_one_that_goes(kubectl: Kubectl) -> None:
    kubectl.apply(llm("changing", TINY, cache={"size": "1Gi"}))
    wait_ready(kubectl, "changing")
    (first,) = claim_names(kubectl)
    second_model = {"model": {"uri": TINY, "revision": "main"}}
    kubectl.patch("llm", "changing", {"spec": second_model})

    def unused() -> Manifest | None:
        claim = kubectl.get("pvc", first)
        assert claim is not None, "it is retained"
        return claim if claim["metadata"]["annotations"].get("quire.dev/unused-since") else None

    wait_for("the first is unused", unused, timeout_s=120, describe=kubectl.describe_all)
    print(kubectl("get", "pvc", "-l", CLAIMS, "-o", f"custom-columns={_COLUMNS}"))
    (second,) = claim_names(kubectl) - {first}
    wait_ready(kubectl, "changing")
    kubectl.patch("llm", "changing", {"spec": {"model": {"revision": None}, "cache": {"retain": False}}})
    wait_for("the second goes", lambda: claim_names(kubectl) == {first}, timeout_s=120, describe=kubectl.describe_all)
    wait_ready(kubectl, "changing")
    assert second != kubectl.llm("changing")["status"]["cache"]["claimName"] == first
    claim = kubectl.get("pvc", first)
    assert claim is not None
    assert not claim["metadata"]["annotations"].get("quire.dev/unused-since")


_COLUMNS = ",".join(
    (
        "CLAIM:.metadata.name",
        "SIZE:.status.capacity.storage",
        r"MODEL:.metadata.annotations.quire\.dev/model-uri",
        r"RETAIN:.metadata.annotations.quire\.dev/retain",
        r"UNUSED-SINCE:.metadata.annotations.quire\.dev/unused-since",
    )
)
