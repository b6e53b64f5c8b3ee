"""The chart as an administrator installs it, and the operators that it runs."""

from pathlib import Path
from typing import Any

from support.images import Images
from support.kubectl import Kubectl, Manifest, run, wait_for

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "quire-system"
RELEASE = "quire"


def chart_values(images: Images, hub_url: str | None) -> dict[str, object]:
    """Return the chart's values for these images, and for a mirror of the hub where there is one."""
    named = {"operator": images.operator, "gateway": images.gateway, "serverCpu": images.server_cpu}
    split = {key: name.rpartition(":") for key, name in named.items()}
    return {
        "images": {key: {"repository": repository, "tag": tag} for key, (repository, _, tag) in split.items()},
        "download": {"hubEndpoint": hub_url} if hub_url else {},
    }


class Chart:
    """One release of `charts/quire`."""

    def __init__(self, helm: Path, kubectl: Kubectl, values: Path) -> None:
        self.kubectl = kubectl.inside(NAMESPACE)
        self._helm = helm
        self._values = values

    def install(self) -> None:
        """Install, or upgrade to the same, and wait until the operators serve."""
        words = (
            "upgrade",
            "--install",
            "--take-ownership",
            RELEASE,
            str(ROOT / "charts" / "quire"),
            "--create-namespace",
        )
        self._run(*words, "--values", str(self._values), "--wait", "--timeout", "180s")
        self.wait_ready()

    def uninstall(self) -> None:
        self._run("uninstall", RELEASE, "--wait", "--timeout", "60s")

    def operator_pods(self) -> list[Manifest]:
        pods = self.kubectl.list("pods", "app.kubernetes.io/component=operator")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def kill_operators(self) -> None:
        """End all operators at once, without a word of warning."""
        for pod in self.operator_pods():
            self.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")

    def lease(self) -> dict[str, Any]:
        found = self.kubectl.get("lease", "quire-operator")
        assert found is not None
        return found

    def lease_s(self) -> float:
        """How long the leader's Lease lasts, in seconds."""
        return float(self.lease()["spec"]["leaseDurationSeconds"])

    def leader(self) -> str:
        """Name the operator pod that holds the Lease; empty where nobody does."""
        return str(self.lease()["spec"].get("holderIdentity") or "")

    def wait_ready(self) -> None:
        """Wait until all operators are ready and one of them leads."""
        self.kubectl(
            "rollout", "status", "deployment", "--selector=app.kubernetes.io/component=operator", "--timeout=120s"
        )
        wait_for(
            "a leader that lives",
            lambda: self.leader() in {pod["metadata"]["name"] for pod in self.operator_pods()},
            timeout_s=60,
            describe=lambda: self.kubectl("logs", "--selector=app.kubernetes.io/component=operator", check=False),
        )

    def _run(self, *words: str) -> str:
        helm = [str(self._helm), f"--kubeconfig={self.kubectl.kubeconfig}", f"--namespace={NAMESPACE}"]
        return run([*helm, *words], timeout_s=240)
