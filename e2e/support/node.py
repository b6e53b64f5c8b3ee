"""What a story does to the node that it runs on: the API server gone for a while, a process without time."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.node import Node
from support.kubectl import Kubectl, Manifest, wait_for
from support.manifests import client_pod

LOAD = Path(__file__).resolve().parent / "load.py"


class ApiServer:
    """Stops and starts kube-apiserver; pods go on meanwhile."""

    PROBE = "after-restart"

    def __init__(self, node: Node) -> None:
        self._node = node

    def restart(self) -> None:
        self._node.control_plane.restart_api_server()

    def wait_followed(self, kubectl: Kubectl) -> None:
        """Wait until kube-proxy acts on news again: its watches come back with a pause of up to half a minute."""
        labels = {"kubernetes.io/service-name": self.PROBE}
        port = {"name": "http", "port": 80}
        kubectl.apply(
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": self.PROBE}, "spec": {"ports": [port]}},
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": self.PROBE, "labels": labels},
                "addressType": "IPv4",
                "endpoints": [{"addresses": ["10.244.0.254"]}],
                "ports": [port],
            },
        )
        wait_for("kube-proxy follows", lambda: f"{self.PROBE}:http -> 10.244.0.254" in _nat_rules(), timeout_s=90)


def _nat_rules() -> str:
    return subprocess.run(["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True).stdout


@contextmanager
def hanging(pod: str) -> Iterator[None]:
    """Give the process of an operator's pod no time while the block runs."""
    variable = f"POD_NAME={pod}".encode()
    (pid,) = (
        int(environment.parent.name)
        for environment in Path("/proc").glob("[0-9]*/environ")
        if variable in _read(environment).split(b"\0")
    )
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _read(environment: Path) -> bytes:
    try:
        return environment.read_bytes()
    except OSError:  # a process that has ended meanwhile
        return b""


def background_load(namespace: str, name: str, image: str) -> Manifest:
    """A pod that asks by itself until it is told to stop, for `kubectl exec` goes through the API server."""
    pod = client_pod(image)
    pod["metadata"]["name"] = "background"
    container = pod["spec"]["containers"][0]
    url = f"http://{name}.{namespace}.svc/v1"
    container["command"] = ["python", "-c", LOAD.read_text(), url, name, "2"]
    container["stdin"] = True
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def stop_background_load(kubectl: Kubectl) -> tuple[int, list[str]]:
    """End the load; return how many requests were answered, and the failures."""
    tell = "import os, signal; os.kill(1, signal.SIGUSR1)"
    kubectl("exec", "background", "--", "python", "-c", tell, check=False)  # may be ended together with the pod
    wait_for("the load's count", lambda: '"answered"' in kubectl("logs", "background"), timeout_s=90)
    counted = json.loads(kubectl("logs", "background").splitlines()[-1])
    return counted["answered"], counted["failures"]
