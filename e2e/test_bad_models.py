"""What can be wrong with a model: each has its REASON, and is cured by changing what was wrong and nothing else."""

import base64

import pytest
from support.hub import GATED_TOKEN, Hub
from support.kubectl import Kubectl, Manifest, condition, wait_for
from support.manifests import llm
from support.traffic import wait_ready


def wait_for_reason(kubectl: Kubectl, name: str, start: str) -> Manifest:
    """Return the LLMDeployment as it was when it said so: a moment later the download may be tried again."""

    def look() -> Manifest | None:
        found = kubectl.llm(name)
        return found if reason_of(found).startswith(start) else None

    found: Manifest = wait_for(f"REASON {start}", look, timeout_s=60, describe=kubectl.describe_all)
    print(kubectl("get", "llm", name))
    return found


def reason_of(llm: Manifest) -> str:
    return str(llm.get("status", {}).get("reason", ""))


def test_gated_until_the_secret_is_named(kubectl: Kubectl) -> None:
    kubectl.apply(llm("gated", "hf://tiny/gated"))
    assert "tokenSecretRef" in reason_of(wait_for_reason(kubectl, "gated", "ModelGated"))
    token = base64.b64encode(GATED_TOKEN.encode()).decode()
    kubectl.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hf"}, "data": {"token": token}})
    model = {"uri": "hf://tiny/gated", "tokenSecretRef": {"name": "hf"}}
    kubectl.patch("llm", "gated", {"spec": {"model": model}})
    wait_ready(kubectl, "gated")
    assert "HF_TOKEN" not in str(kubectl.pods("gated"))


def test_missing_until_it_is_published(kubectl: Kubectl, hub: Hub) -> None:
    kubectl.apply(llm("missing", "hf://tiny/later"))
    wait_for_reason(kubectl, "missing", "ModelNotFound")
    with hub.published("tiny/later", like="tiny/llama"):
        wait_ready(kubectl, "missing")


def test_corrupt_until_the_file_is_right(kubectl: Kubectl, hub: Hub) -> None:
    with hub.changed("tiny/corrupt", corrupt=["model.safetensors"]):
        kubectl.apply(llm("corrupt", "hf://tiny/corrupt"))
        assert "model.safetensors" in reason_of(wait_for_reason(kubectl, "corrupt", "ChecksumMismatch"))
    wait_ready(kubectl, "corrupt")


@pytest.mark.own_cluster
def test_too_big_for_the_volume_until_another_is_asked_for(kubectl: Kubectl) -> None:
    tiny = {"size": "48Mi", "storageClassName": "tiny"}
    kubectl.apply(llm("big", "hf://quire/SmolLM2-135M-Instruct", memory="2Gi", cache=tiny))
    full = wait_for_reason(kubectl, "big", "NoSpace")
    assert "needs" in reason_of(full)
    assert "MiB" in reason_of(full)
    assert "spec.cache" in condition(full, "ModelCached")["message"]
    kubectl("delete", "llm", "big")
    kubectl("delete", "pvc", "--all", "--wait=true")
    kubectl.apply(llm("big", "hf://quire/SmolLM2-135M-Instruct", memory="2Gi", cache={"size": "2Gi"}))
    wait_ready(kubectl, "big")


def test_no_storage_class_until_one_is_named(kubectl: Kubectl) -> None:
    kubectl.apply(llm("nowhere", cache={"size": "1Gi", "storageClassName": "no-such-class"}))
    reason = reason_of(wait_for_reason(kubectl, "nowhere", "StorageClassNotFound"))
    assert "no-such-class" in reason
    assert "standard" in reason, "the classes that there are"
    kubectl.patch("llm", "nowhere", {"spec": {"cache": {"storageClassName": "standard"}}})
    wait_ready(kubectl, "nowhere")
