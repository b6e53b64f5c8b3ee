"""What the chart's tests share: the module behind `make chart`, and an API server that judges but keeps nothing."""

import importlib.util
import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.kubectl import Kubectl

ROOT = Path(__file__).resolve().parents[2]


def _load(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rendering() -> ModuleType:
    """`deploy/render_chart.py`."""
    return _load(ROOT / "deploy" / "render_chart.py")


@pytest.fixture
def apply_dry(rules_kubectl: Kubectl) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Have the API server judge a document in a restricted namespace of its own; a warning fails as an error does."""
    name = f"chart-{uuid.uuid4().hex[:8]}"
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    rules_kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})

    def ask(document: dict[str, Any]) -> None:
        if "namespace" in document["metadata"]:
            document["metadata"]["namespace"] = name
        words = ("apply", "--server-side", "--force-conflicts", "--validate=strict", "--dry-run=server", "-f", "-")
        asking = rules_kubectl.inside(name).words(*words)
        done = subprocess.run(asking, input=json.dumps(document), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), json.dumps(document)

    yield ask
    rules_kubectl("delete", "namespace", name, "--wait=false")
