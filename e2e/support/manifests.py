"""The objects that the stories apply."""

from typing import Any

from support.kubectl import Manifest

TINY = "hf://tiny/llama"
"""Two layers of random weights: starts in a few seconds."""
SMOLLM2 = "hf://quire/SmolLM2-135M-Instruct"


def llm(name: str, uri: str = TINY, *, memory: str = "1Gi", cpu: str = "1", **spec: Any) -> Manifest:
    """Return an LLMDeployment for a CPU that ends its pods quickly. `spec` adds to it, and replaces."""
    defaults: Manifest = {
        "model": {"uri": uri},
        "resources": {"limits": {"cpu": cpu, "memory": memory}, "requests": {"cpu": "100m", "memory": "256Mi"}},
        "engine": {"maxModelLen": 256, "maxNumSeqs": 8},
        "scaling": {"mode": "Off"},
        "replicas": 1,
        "drain": {"timeout": "30s", "preStop": "3s"},
        "cache": {"size": "2Gi"},
    }
    return {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name},
        "spec": {**defaults, **spec},
    }


def client_pod(image: str) -> Manifest:
    """A pod with Python and httpx that waits to be told what to do."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "client"},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "client",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python", "-c", "import signal; signal.pause()"],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
        },
    }
