"""The images that the stories run: built from this tree and loaded into the node, or named by the environment.

As a command it builds them, and the programs of the node, so that nothing waits for a compiler under a test's time-out.
What is built stays: a build that is cut off goes on where it was.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.builder import BuiltImage, build_image
from cluster.node import Node, find_node
from cluster.packages import PROVIDES, ensure_packages
from cluster.shell import ClusterError

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
    built = build_archives()
    for image in built.values():
        node.load_image(image.archive)
    return Images(operator=built["operator"].name, gateway=built["gateway"].name, server_cpu=built["server-cpu"].name)


def build_archives() -> dict[str, BuiltImage]:
    """Build what has changed; by target."""
    wheels = [Path(found) for found in os.environ.get("PIP_FIND_LINKS", "").split() if Path(found).is_dir()][:1]
    extra = [f"--build-context=wheels={folder}" for folder in wheels]
    built = {}
    for target in ("operator", "gateway", "server-cpu"):
        arguments = {"KERNELS": "prebuilt", **({"TORCH_INDEX_URL": ""} if wheels else {})}
        built[target] = build_image(target, sources=SOURCES, build_args=arguments, extra=extra, directories=wheels)
    return built


def named_images() -> Images:
    """Return the images that the environment names."""
    given = os.environ.get(REGISTRY_VARIABLE, "")
    prefix, separator, tag = given.rpartition(":")
    assert separator, f"with KUBECONFIG, {REGISTRY_VARIABLE} says where the images are: REGISTRY/PREFIX:TAG"
    return Images(
        operator=f"{prefix}/operator:{tag}", gateway=f"{prefix}/gateway:{tag}", server_cpu=f"{prefix}/server-cpu:{tag}"
    )


def main() -> int:
    """Build all that a node and the stories need, unless a cluster and its images are given; return the status."""
    if os.environ.get("KUBECONFIG"):
        return 0
    try:
        ensure_packages(PROVIDES)
        find_node()
        build_archives()
    except ClusterError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
