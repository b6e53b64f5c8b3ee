"""A server process that is killed comes back, and its LLMDeployment says what happened."""

from support.kubectl import Kubectl, Manifest, condition, wait_for
from support.manifests import llm
from support.traffic import ask, start_client, wait_ready

KILL_ENGINE = """
import os, signal
for pid in filter(str.isdigit, os.listdir("/proc")):
    with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
        if b"quire_server.engine_process.process" in cmdline.read() and int(pid) != os.getpid():
            os.kill(int(pid), signal.SIGKILL)
"""
TAKE_MEMORY = "import time; hold = bytearray(4 << 30); time.sleep(60)"


def restarts(kubectl: Kubectl, name: str) -> int:
    pods: list[Manifest] = kubectl.pods(name)
    return sum(status["restartCount"] for pod in pods for status in pod["status"].get("containerStatuses", ()))


def test_a_killed_engine_restarts_and_is_explained(kubectl: Kubectl, server_image: str) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("killed"))
    wait_ready(kubectl, "killed")
    pod = kubectl.pods("killed")[0]["metadata"]["name"]
    kubectl("exec", pod, "-c", "server", "--", "python", "-c", KILL_ENGINE)
    wait_for(
        "not Ready, with the cause",
        lambda: "EngineKilled" in kubectl.llm("killed")["status"]["reason"],
        timeout_s=60,
        every_s=0.1,
        describe=kubectl.describe_all,
    )
    print("\n" + kubectl("get", "llm"))
    wait_ready(kubectl, "killed")
    assert restarts(kubectl, "killed") == 1
    assert ask(kubectl, "killed", "Hello")["chunks"] > 0
    messages = [event["message"] for event in kubectl.events()]
    assert any("SIGKILL" in message for message in messages), messages


def test_out_of_memory_is_named(kubectl: Kubectl, server_image: str) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("hungry"))
    wait_ready(kubectl, "hungry")
    # A pod that takes more than its limit as it starts: the kernel kills it, and the operator says why.
    kubectl.patch(
        "llm",
        "hungry",
        {
            "spec": {
                "rollout": {"strategy": "Replace", "waitForIdle": "0s"},
                "podTemplate": {
                    "spec": {"containers": [{"name": "server", "command": ["python", "-c", TAKE_MEMORY], "args": None}]}
                },
            }
        },
    )
    wait_for(
        "REASON OutOfMemory",
        lambda: "OutOfMemory" in kubectl.llm("hungry")["status"]["reason"],
        timeout_s=120,
        every_s=0.2,
        describe=kubectl.describe_all,
    )
    assert "memory" in condition(kubectl.llm("hungry"), "Loaded")["message"]
    print("\n" + kubectl("get", "llm"))
    kubectl.patch("llm", "hungry", {"spec": {"podTemplate": None}})
    wait_ready(kubectl, "hungry")
    assert ask(kubectl, "hungry", "Hello")["chunks"] > 0
