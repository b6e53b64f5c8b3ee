"""The LLMDeployment CustomResourceDefinition as a document: the one schema that every process validates against.

The file is `crds/llmdeployment.yaml` of the repository; this package holds a link to it, and the wheel a copy.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from quire_contract.names import API_VERSION


@cache
def load_crd() -> dict[str, Any]:
    """Return the whole document. Every caller gets the same object: read it, do not change it."""
    import yaml  # here, because a process that never validates should not load it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = files("quire_contract").joinpath("llmdeployment.crd.yaml").read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.load(text, Loader=loader)
    return document


@cache
def load_schema() -> dict[str, Any]:
    """Return the OpenAPI v3 schema of the served version."""
    for version in load_crd()["spec"]["versions"]:
        if version["name"] == API_VERSION:
            schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
            return schema
    raise AssertionError(f"the CustomResourceDefinition has no version {API_VERSION}")
