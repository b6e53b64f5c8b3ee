"""The images that the stories run: built from this tree and loaded into the node, or named by the environment."""

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.builder import build_image
from cluster.node import Node

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("pyproject.toml", "README.md", "LICENSE", "deploy/image"),
    *("contract", "kube", "crds", "operator", "gateway", "server", "kernels", "cli"),
)
REGISTRY_VARIABLE = "QUIRE_E2E_IMAGES"
"""Where the images are, for a cluster that is not ours: `REGISTRY/PREFIX:TAG`, such as registry.example/quire:dev."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    operator: str
    gateway: str
    server_cpu: str


def build_images(node: Node) -> Images:
    """Build what has changed, and load it into the node."""
    wheels = [Path(found) for found in os.environ.get("PIP_FIND_LINKS", "").split() if Path(found).is_dir()][:1]
    extra = [f"--build-context=wheels={folder}" for folder in wheels]
    built = {}
    for target in ("operator", "gateway", "server-cpu"):
        arguments = {"KERNELS": "prebuilt", **({"TORCH_INDEX_URL": ""} if wheels else {})}
        image = build_image(target, sources=SOURCES, build_args=arguments, extra=extra, directories=wheels)
        node.load_image(image.archive)
        built[target] = image.name
    return Images(operator=built["operator"], gateway=built["gateway"], server_cpu=built["server-cpu"])


def named_images() -> Images:
    """Return the images that the environment names."""
    given = os.environ.get(REGISTRY_VARIABLE, "")
    prefix, separator, tag = given.rpartition(":")
    assert separator, f"with KUBECONFIG, {REGISTRY_VARIABLE} says where the images are: REGISTRY/PREFIX:TAG"
    return Images(
        operator=f"{prefix}/operator:{tag}", gateway=f"{prefix}/gateway:{tag}", server_cpu=f"{prefix}/server-cpu:{tag}"
    )
