"""helm install, kubectl apply, and a pod of the cluster gets a streamed answer by the Service's DNS name."""

import time

from support.kubectl import Kubectl, is_true
from support.manifests import SMOLLM2, llm
from support.traffic import ask, base_url, start_client, wait_ready


def test_one_manifest_to_a_streamed_answer(kubectl: Kubectl, server_image: str) -> None:
    start_client(kubectl, server_image)
    started = time.monotonic()
    kubectl.apply(llm("smollm2", SMOLLM2, cpu="2", memory="2Gi", engine={"maxModelLen": 2048}))
    wait_ready(kubectl, "smollm2")
    ready_s = time.monotonic() - started
    answer = ask(kubectl, "smollm2", "What is the capital of France?")
    assert "Paris" in answer["text"], answer
    assert answer["chunks"] > 1, answer

    status = kubectl.llm("smollm2")["status"]
    assert status["phase"] == "Ready"
    assert status["reason"] == ""
    assert status["endpoint"] == base_url(kubectl, "smollm2")
    assert status["readyReplicas"] == status["replicas"] == 1
    assert len(status["model"]["revision"]) == 40
    stages = status["coldStart"]["stages"]
    assert {"schedule", "load", "download"} <= stages.keys()
    shown = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items())
    print(f"\napply to Ready {ready_s:.1f} s ({shown}); first token {answer['first_s']:.2f} s: {answer['text']!r}")
    print(kubectl("get", "llm"))


def test_the_one_number_scales(kubectl: Kubectl, server_image: str) -> None:
    kubectl.apply(llm("scaled"))
    wait_ready(kubectl, "scaled")
    kubectl("scale", "llm/scaled", "--replicas=2")
    kubectl("wait", "--for=jsonpath={.status.readyReplicas}=2", "llm/scaled", "--timeout=120s", timeout_s=150)
    kubectl("scale", "llm/scaled", "--replicas=1")
    kubectl("wait", "--for=jsonpath={.status.replicas}=1", "llm/scaled", "--timeout=120s", timeout_s=150)
    kubectl.patch("llm", "scaled", {"spec": {"suspend": True}})
    kubectl("wait", "--for=jsonpath={.status.phase}=Suspended", "llm/scaled", "--timeout=120s", timeout_s=150)
    print(kubectl("get", "llm"))
    kubectl.patch("llm", "scaled", {"spec": {"suspend": False}})
    wait_ready(kubectl, "scaled")
    assert is_true(kubectl.llm("scaled"), "Ready")
