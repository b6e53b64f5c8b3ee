"""The Job shows how far it is, survives the loss of its pod half way, and works for everyone who wants the model."""

from support.hub import Hub
from support.kubectl import Kubectl, wait_for
from support.manifests import SMOLLM2, llm
from support.traffic import wait_ready


def test_a_killed_download_goes_on_and_is_shared(kubectl: Kubectl, hub: Hub) -> None:
    size_bytes = hub.size_of("quire/SmolLM2-135M-Instruct")
    with hub.changed("quire/SmolLM2-135M-Instruct", bytes_per_second=size_bytes // 20):
        before = hub.served_bytes("quire/SmolLM2-135M-Instruct")
        kubectl.apply(llm("first", SMOLLM2, memory="2Gi", engine={"maxModelLen": 512}))

        def percent() -> float:
            return float(kubectl.llm("first").get("status", {}).get("model", {}).get("download", {}).get("percent", 0))

        seen = wait_for("progress in status", percent, timeout_s=60, describe=kubectl.describe_all)
        wait_for("more progress", lambda: percent() > max(seen, 30), timeout_s=60, describe=kubectl.describe_all)
        status = kubectl.llm("first")["status"]
        assert status["phase"] == "Downloading"
        assert status["model"]["download"]["bytesPerSecond"] > 0
        assert status["model"]["download"]["etaSeconds"] > 0
        print("\n" + kubectl("get", "llm"))
        pods = kubectl.list("pods", "app.kubernetes.io/component=download")
        assert len(pods) == 1
        kubectl("delete", "pod", pods[0]["metadata"]["name"], "--grace-period=0", "--force")
        killed_at = percent()
        wait_for("progress after the kill", lambda: percent() > killed_at, timeout_s=90, describe=kubectl.describe_all)
    wait_ready(kubectl, "first")
    served = hub.served_bytes("quire/SmolLM2-135M-Instruct") - before
    assert served < 1.35 * size_bytes, f"{served} bytes were served for a model of {size_bytes}"

    before = hub.served_bytes("quire/SmolLM2-135M-Instruct")
    kubectl.apply(llm("second", SMOLLM2, memory="2Gi", engine={"maxModelLen": 512}))
    wait_ready(kubectl, "second")
    assert hub.served_bytes("quire/SmolLM2-135M-Instruct") == before
    assert len(kubectl.list("pvc")) == 1
    first, second = kubectl.llm("first")["status"]["model"], kubectl.llm("second")["status"]["model"]
    assert first["revision"] == second["revision"]
