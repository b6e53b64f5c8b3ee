"""A cluster, the images in it, the chart installed, the hub mirror, and a namespace for each story.

Without KUBECONFIG the node of `make cluster` is brought up, and taken down again unless it was up before. With it, that
cluster is used; it must reach the images that QUIRE_E2E_IMAGES names, and this machine under QUIRE_E2E_HOST.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cluster.network import NODE_ADDRESS
from cluster.node import Node, running_node
from support.chart import Chart, chart_values
from support.hub import GATED_TOKEN, Hub
from support.images import Images, build_images, named_images
from support.kubectl import Kubectl
from support.models import make_smollm2, make_tiny
from support.node import ApiServer
from support.promise import ReadyPromise

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where the stories run. `node` is None in a cluster that is not ours."""

    kubeconfig: Path
    kubectl: Path
    helm: Path
    host: str
    """This machine's address, as pods reach it."""
    node: Node | None


def bind_kubectl(cluster: Cluster, namespace: str = "default") -> Kubectl:
    return Kubectl(cluster.kubectl, cluster.kubeconfig, namespace)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    given = os.environ.get("KUBECONFIG")
    if given:
        kubectl, helm = shutil.which("kubectl"), shutil.which("helm")
        assert kubectl, "with KUBECONFIG, kubectl must be on the PATH"
        assert helm, "with KUBECONFIG, helm must be on the PATH"
        host = os.environ["QUIRE_E2E_HOST"]
        yield Cluster(kubeconfig=Path(given), kubectl=Path(kubectl), helm=Path(helm), host=host, node=None)
        return
    with running_node() as node:
        kubectl = node.admin.binary
        yield Cluster(kubeconfig=node.kubeconfig, kubectl=kubectl, helm=node.helm, host=NODE_ADDRESS, node=node)


@pytest.fixture(scope="session")
def images(cluster: Cluster) -> Images:
    return named_images() if cluster.node is None else build_images(cluster.node)


@pytest.fixture(autouse=True)
def _only_where_it_can_run(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("own_cluster") and os.environ.get("KUBECONFIG"):
        pytest.skip("needs the node of `make cluster`: it stops the API server, or has the volumes for it")


@pytest.fixture(scope="session")
def hub(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    tiny = make_tiny(folder / "tiny")
    models = dict.fromkeys(("tiny/llama", "tiny/gated", "tiny/corrupt"), tiny)
    mirror = Hub(folder, cluster.host, {**models, "quire/SmolLM2-135M-Instruct": make_smollm2()})
    mirror.gate("tiny/gated", GATED_TOKEN)
    yield mirror
    mirror.close()


@pytest.fixture(scope="session")
def chart(cluster: Cluster, images: Images, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chart]:
    """The chart, installed from this tree."""
    values = tmp_path_factory.mktemp("chart") / "values.yaml"
    values.write_text(yaml.safe_dump(chart_values(images, hub.url)))
    installed = Chart(cluster.helm, bind_kubectl(cluster), values)
    installed.install()
    yield installed
    installed.uninstall()


@pytest.fixture(scope="session")
def promise(cluster: Cluster, chart: Chart) -> Iterator[ReadyPromise]:
    """Who asks, during all stories, whatever says that it is Ready."""
    asking = ReadyPromise(bind_kubectl(cluster))
    yield asking
    asking.close()


@pytest.fixture
def kubectl(cluster: Cluster, promise: ReadyPromise, request: pytest.FixtureRequest) -> Iterator[Kubectl]:
    """kubectl in a namespace of the story's own, which takes only restricted pods."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.originalname.removeprefix("test_"))[:50].strip("-")
    bound = bind_kubectl(cluster, name)
    bound("delete", "namespace", name, "--ignore-not-found", timeout_s=150)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    bound.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    yield bound
    broken = promise.broken_in(name)
    bound("delete", "namespace", name, "--ignore-not-found", "--wait=false")
    assert broken == [], "Ready said True, and nobody was answered"


@pytest.fixture
def rules_kubectl(cluster: Cluster) -> Kubectl:
    """kubectl where the CRD is, with or without an operator."""
    bound = bind_kubectl(cluster)
    bound("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds" / "llmdeployment.yaml"))
    return bound


@pytest.fixture
def restricted(rules_kubectl: Kubectl) -> Iterator[Kubectl]:
    """The same in a new namespace, whose pods must be restricted."""
    name = f"restricted-{uuid.uuid4().hex[:8]}"
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    rules_kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    yield rules_kubectl.inside(name)
    rules_kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def server_image(images: Images) -> str:
    return images.server_cpu


@pytest.fixture
def api_server(cluster: Cluster) -> ApiServer:
    assert cluster.node is not None
    return ApiServer(cluster.node)
