"""Every golden document, judged by a real API server: taken as it is, within Pod Security's restricted profile, and
unchanged when it comes back, so that no reconcile finds anything to do.

Kinds that a cluster may not have are checked in `tests/operator/test_optional_kinds.py`; their pod templates are here.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kubectl import Kubectl

from quire_contract.names import FIELD_MANAGER
from quire_operator.plan.drift import describe_drift, is_applied
from quire_operator.spec.kinds import OPTIONAL_KINDS

GOLDEN = sorted((Path(__file__).resolve().parents[1] / "tests" / "operator" / "golden").glob("*.yaml"))
OPTIONAL = {kind.kind for kind in OPTIONAL_KINDS}


def apply_dry(kubectl: Kubectl, document: dict[str, Any]) -> dict[str, Any]:
    """Return what the API server would store; fail if it refuses, or has a warning."""
    words = kubectl.words(
        *("apply", "--server-side", f"--field-manager={FIELD_MANAGER}", "--force-conflicts", "--validate=strict"),
        *("--dry-run=server", "-o", "json", "-f", "-"),
    )
    done = subprocess.run(words, input=json.dumps(document), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), json.dumps(document)
    stored: dict[str, Any] = json.loads(done.stdout)
    return stored


def mounts_an_image(document: dict[str, Any]) -> bool:
    is_workload = document["kind"] == "Deployment"
    return is_workload and any("image" in volume for volume in document["spec"]["template"]["spec"]["volumes"])


def has_image_volumes(kubectl: Kubectl) -> bool:
    """Whether the API server keeps volumes of type `image`; otherwise it drops them, and says nothing."""
    lines = kubectl("get", "--raw", "/metrics").splitlines()
    return not any('name="ImageVolume"' in line and line.endswith(" 0") for line in lines)


def pod_templates(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates of a LeaderWorkerSet, each as an object of its own."""
    templates = document.get("spec", {}).get("leaderWorkerTemplate", {})
    for role in ("leaderTemplate", "workerTemplate"):
        if role in templates:
            yield {
                "apiVersion": "v1",
                "kind": "PodTemplate",
                "metadata": {**document["metadata"], "name": role.lower()},
                "template": templates[role],
            }


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_a_real_api_server_takes_what_is_rendered_and_keeps_it(restricted: Kubectl, file: Path) -> None:
    rendered = list(yaml.safe_load_all(file.read_text()))
    documents = [document for document in rendered if document["kind"] not in OPTIONAL]
    documents += [template for document in rendered for template in pod_templates(document)]
    assert documents
    for document in documents:
        document["metadata"]["namespace"] = restricted.namespace
        stored = apply_dry(restricted, document)
        if mounts_an_image(document) and not has_image_volumes(restricted):
            assert "/models" in describe_drift(document, stored)
        else:
            assert describe_drift(document, stored) == ""
            assert is_applied(document, stored)
