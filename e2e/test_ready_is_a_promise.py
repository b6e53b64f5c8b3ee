"""Ready says what a client meets. `support/promise.py` asks all the while, here and in every other story."""

import time

from support.kubectl import Kubectl, Manifest, condition, is_true, wait_for
from support.manifests import llm
from support.promise import ReadyPromise
from support.traffic import ask, start_client, wait_ready


def wait_says(kubectl: Kubectl, name: str, type_: str, status: str, reason: str, timeout_s: float) -> Manifest:
    """Wait until a condition says this; return it."""

    def look() -> Manifest | None:
        said = condition(kubectl.llm(name), type_)
        return said if (said["status"], said["reason"]) == (status, reason) else None

    found: Manifest = wait_for(
        f"{name} says {type_}={status} {reason}", look, timeout_s=timeout_s, describe=kubectl.describe_all
    )
    return found


def test_a_foreign_service_is_not_ours_and_its_end_heals_within_seconds(
    kubectl: Kubectl, server_image: str, promise: ReadyPromise
) -> None:
    start_client(kubectl, server_image)
    port = {"name": "http", "port": 80, "targetPort": "http"}
    spec = {"selector": {"app": "nobody"}, "ports": [port]}
    kubectl.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "taken"}, "spec": spec}, llm("taken"))
    kubectl("wait", "--for=jsonpath={.status.readyReplicas}=1", "llm/taken", "--timeout=180s", timeout_s=200)
    wait_says(kubectl, "taken", "ServiceReady", "False", "ServiceMissing", 10)
    status = kubectl.llm("taken")["status"]
    assert not is_true(kubectl.llm("taken"), "Ready")
    assert status["reason"].startswith("NameTaken: Service "), status["reason"]
    num_before, started = promise.num_answered, time.monotonic()
    kubectl("delete", "service", "taken")
    wait_says(kubectl, "taken", "Ready", "True", "Serving", 20)
    print(f"\nReady {time.monotonic() - started:.1f} s after the foreign Service was gone")
    assert ask(kubectl, "taken", "Hello")["chunks"] > 0
    wait_for("the promise is held to", lambda: promise.num_answered > num_before, timeout_s=30)


def test_a_paused_hot_fix_stays_and_is_shown(kubectl: Kubectl) -> None:
    kubectl.apply(llm("held"))
    wait_ready(kubectl, "held")
    kubectl("annotate", "llm", "held", "quire.dev/paused=true")
    wait_says(kubectl, "held", "RolloutComplete", "True", "Paused", 20)
    kubectl.patch("service", "held", {"spec": {"selector": {"quire.dev/deployment": "another"}}})
    wait_says(kubectl, "held", "Ready", "False", "ServiceMisled", 20)
    kubectl.patch("deployment", "held", {"spec": {"progressDeadlineSeconds": 77}})
    wait_says(kubectl, "held", "RolloutComplete", "False", "Paused", 20)
    live = kubectl.get("deployment", "held")
    assert live is not None
    assert live["spec"]["progressDeadlineSeconds"] == 77
    print(kubectl("get", "llm"))
    kubectl("annotate", "llm", "held", "quire.dev/paused-")
    wait_says(kubectl, "held", "Ready", "True", "Serving", 20)
    live = kubectl.get("deployment", "held")
    assert live is not None
    assert live["spec"]["progressDeadlineSeconds"] != 77
    said = [event["reason"] for event in kubectl.events() if event["involvedObject"]["kind"] == "LLMDeployment"]
    assert {"Paused", "Resumed", "Healed"} <= set(said), said


def test_a_probe_that_ends_the_load_is_named_with_its_budget(kubectl: Kubectl) -> None:
    impatient = {"name": "server", "startupProbe": {"periodSeconds": 1, "failureThreshold": 1}}
    kubectl.apply(llm("killed", podTemplate={"spec": {"containers": [impatient]}}))
    said = wait_says(kubectl, "killed", "Loaded", "False", "StartupProbeFailed", 180)
    assert "within 1 s" in said["message"], said
    assert "raise startupProbe.failureThreshold in spec.podTemplate" in said["message"], said
    print(kubectl("get", "llm"))


def test_what_never_gets_a_node_is_told_by_name(kubectl: Kubectl) -> None:
    kubectl.apply(llm("unseen", podTemplate={"spec": {"schedulerName": "nowhere"}}))
    said = wait_says(kubectl, "unseen", "Scheduled", "False", "NoScheduler", 180)
    assert "no scheduler called nowhere" in said["message"], said
    warnings = [event["reason"] for event in kubectl.events() if event["type"] == "Warning"]
    assert "DownloadUnschedulable" not in warnings
