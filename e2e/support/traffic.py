"""Requests from a pod in the cluster, by the Service's DNS name, as an application sends them."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.kubectl import Kubectl, wait_for
from support.manifests import client_pod

HERE = Path(__file__).resolve().parent


def start_client(kubectl: Kubectl, image: str) -> None:
    """Make sure that the namespace has its client pod."""
    kubectl.apply(client_pod(image))
    kubectl("wait", "--for=condition=Ready", "pod/client", "--timeout=60s")


def base_url(kubectl: Kubectl, name: str) -> str:
    return f"http://{name}.{kubectl.namespace}.svc/v1"


def ask(kubectl: Kubectl, name: str, question: str) -> dict[str, Any]:
    """Stream one answer; return its text, the number of pieces, and the seconds to the first and the last."""
    words = ("exec", "-i", "client", "--", "python", "-", base_url(kubectl, name), name, question)
    answer: dict[str, Any] = json.loads(kubectl(*words, stdin=(HERE / "ask.py").read_text()))
    return answer


@dataclass
class Load:
    """What came of the requests; filled in when the load ends."""

    answered: int = 0
    failures: list[str] = field(default_factory=list)
    num_failed: int = 0


@contextmanager
def load(kubectl: Kubectl, name: str, num_askers: int = 3) -> Iterator[Load]:
    """Ask without a pause while the block runs."""
    program = (HERE / "load.py").read_text()
    words = kubectl.words("exec", "-i", "client", "--", "python", "-c", program)
    words += [base_url(kubectl, name), name, str(num_askers)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    result = Load()
    try:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        assert first_line == "asking\n", first_line
        yield result
        output, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        counted = json.loads(output)
        result.answered, result.failures = counted["answered"], counted["failures"]
        result.num_failed = counted["num_failed"]
    finally:
        process.kill()
        process.wait()


def wait_ready(kubectl: Kubectl, name: str, timeout_s: float = 180.0) -> None:
    """`kubectl wait`, and what there is to see where that fails."""
    words = ("wait", "--for=condition=Ready", f"llm/{name}", f"--timeout={timeout_s:.0f}s")
    wait_for(
        f"{name} Ready",
        lambda: "condition met" in kubectl(*words, timeout_s=timeout_s + 30, check=False),
        timeout_s=1.0,
        describe=kubectl.describe_all,
    )
