"""The manifests of `tests/operator/verdicts`, for whoever judges them."""

from pathlib import Path
from typing import Any

import yaml

VERDICTS = Path(__file__).resolve().parents[1] / "operator" / "verdicts"
GOOD = yaml.safe_load((VERDICTS / "good.yaml").read_text())
BAD = yaml.safe_load((VERDICTS / "bad.yaml").read_text())


def build_manifest(case: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a case, as the README beside the cases says."""
    spec = dict(case.get("spec", {}))
    if not case.get("bare"):
        spec.setdefault("model", {"uri": "hf://org/model"})
        if not {"resources", "profile", "profiles"} & set(spec):
            spec["resources"] = {"limits": {"cpu": 1}}
    manifest = {
        "apiVersion": "quire.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": case.get("name", "m")},
        "spec": spec,
    }
    return manifest | case.get("top", {})
