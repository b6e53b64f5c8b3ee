"""Too much for the pod, the node or its GPUs: said with numbers, and nobody else suffers."""

from support.kubectl import Kubectl, condition, is_true, wait_for
from support.manifests import SMOLLM2, llm
from support.traffic import ask, start_client, wait_ready


def test_too_big_for_its_memory_limit(kubectl: Kubectl, server_image: str) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("good"))
    wait_ready(kubectl, "good")
    kubectl.apply(llm("wide", SMOLLM2, memory="280Mi", engine={"maxModelLen": 8192}))
    wait_for(
        "Fits=False",
        lambda: condition(kubectl.llm("wide"), "Fits")["status"] == "False",
        timeout_s=90,
        describe=kubectl.describe_all,
    )
    wide = kubectl.llm("wide")
    print("\n" + kubectl("get", "llm"))
    assert "needs" in wide["status"]["reason"]
    assert "has" in wide["status"]["reason"]
    assert wide["status"]["fit"]["needBytes"] > wide["status"]["fit"]["haveBytes"]
    assert kubectl.pods("wide") == []
    kubectl.patch("llm", "wide", {"spec": {"resources": {"limits": {"memory": "2Gi"}}}})
    wait_ready(kubectl, "wide")
    assert ask(kubectl, "good", "Hello")["chunks"] > 0


def test_more_memory_than_the_node_has(kubectl: Kubectl) -> None:
    huge = {"limits": {"cpu": "1", "memory": "4Ti"}, "requests": {"memory": "4Ti"}}
    kubectl.apply(llm("huge", resources=huge))
    wait_for(
        "Scheduled=False",
        lambda: condition(kubectl.llm("huge"), "Scheduled")["status"] == "False",
        timeout_s=90,
        describe=kubectl.describe_all,
    )
    reason = kubectl.llm("huge")["status"]["reason"]
    assert reason.startswith("InsufficientMemory"), reason
    assert "nodes are available" in reason


def test_more_gpus_than_the_node_has(kubectl: Kubectl, server_image: str) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("good"))
    wait_ready(kubectl, "good")
    kubectl.apply(llm("eight", resources={"limits": {"nvidia.com/gpu": 8}}))
    wait_for(
        "REASON InsufficientGPU",
        lambda: kubectl.llm("eight").get("status", {}).get("reason", "").startswith("InsufficientGPU"),
        timeout_s=90,
        describe=kubectl.describe_all,
    )
    print("\n" + kubectl("get", "llm"))
    assert "nvidia.com/gpu" in kubectl.llm("eight")["status"]["reason"]
    assert is_true(kubectl.llm("good"), "Ready")
    assert ask(kubectl, "good", "Hello")["chunks"] > 0
