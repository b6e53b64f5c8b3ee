"""`make cluster-demo`: a node, the images of this tree, the chart, one manifest, and a streamed answer.

Everything stays up, to be tried further. The model comes from the Hub where this machine reaches it, else from a mirror
of the one model, which this program runs for as long as the download takes.
"""

import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import yaml
from cluster.network import NODE_ADDRESS
from cluster.node import Node, up
from cluster.shell import ClusterError
from support.chart import NAMESPACE, Chart, chart_values
from support.hub import Hub
from support.images import Images, build_images
from support.kubectl import CommandError, Kubectl, is_true, wait_for
from support.models import make_smollm2
from support.traffic import ask, base_url, start_client

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "examples" / "smollm2.yaml"
HUB = "https://huggingface.co"
QUESTION = "What is the capital of France?"
_HUB_TIMEOUT_S = 5.0
_READY_TIMEOUT_S = 900.0


def main() -> int:
    """Show it all; return the exit status."""
    try:
        node = _show("A node", up)
        images = _show("The images of this tree", lambda: build_images(node))
        kubectl = Kubectl(node.admin.binary, node.kubeconfig, "default")
        with tempfile.TemporaryDirectory() as folder, _find_hub(Path(folder)) as mirror_url:
            _install(node, images, mirror_url, Path(folder))
            _serve(kubectl)
        _ask(kubectl, images)
    except (ClusterError, CommandError, AssertionError) as error:
        print(f"\ncluster-demo: {error}", file=sys.stderr)
        return 1
    _say_what_next(node)
    return 0


def _show(what: str, work: Callable[[], T]) -> T:
    print(f"\n== {what}", flush=True)
    return work()


@contextmanager
def _find_hub(folder: Path) -> Iterator[str | None]:
    """Give the address of a mirror, or None where the Hub itself answers."""
    try:
        urllib.request.urlopen(HUB, timeout=_HUB_TIMEOUT_S).close()
    except OSError as error:
        print(f"\n{HUB} is not reached from here ({error}); a mirror on this machine has the demo's model")
    else:
        yield None
        return
    mirror = Hub(folder, NODE_ADDRESS, {_repository(): make_smollm2()})
    try:
        yield mirror.url
    finally:
        mirror.close()


def _repository() -> str:
    uri: str = yaml.safe_load(MANIFEST.read_text())["spec"]["model"]["uri"]
    return uri.removeprefix("hf://")


def _install(node: Node, images: Images, mirror_url: str | None, folder: Path) -> None:
    values = folder / "values.yaml"
    values.write_text(yaml.safe_dump(chart_values(images, mirror_url)))
    chart = Chart(node.helm, Kubectl(node.admin.binary, node.kubeconfig, NAMESPACE), values)
    _show(f"helm upgrade --install quire charts/quire -n {NAMESPACE} --create-namespace", chart.install)


def _serve(kubectl: Kubectl) -> None:
    """Apply the manifest, and tell each change of what `kubectl get llm` shows until it is ready."""
    print(f"\n== kubectl apply -f {MANIFEST.relative_to(ROOT)}; kubectl get llm --watch")
    kubectl("apply", "-f", str(MANIFEST))
    shown = ""

    def is_ready() -> bool:
        nonlocal shown
        llm = kubectl.llm("smollm2")
        status = llm.get("status") or {}
        if (line := f"{status.get('phase', ''):12} {status.get('reason', '')}") != shown:
            print(line, flush=True)
            shown = line
        return is_true(llm, "Ready")

    wait_for("smollm2 Ready", is_ready, timeout_s=_READY_TIMEOUT_S, describe=kubectl.describe_all)
    print(kubectl("get", "llm"))


def _ask(kubectl: Kubectl, images: Images) -> None:
    start_client(kubectl, images.server_cpu)
    print(f"\n== {base_url(kubectl, 'smollm2')}, asked from a pod\n> {QUESTION}")
    answer = ask(kubectl, "smollm2", QUESTION)
    print(f"{answer['text']}\n(first token after {answer['first_s']:.2f} s)")


def _say_what_next(node: Node) -> None:
    programs = node.admin.binary.parent
    print(
        f"""
It stays up. kubectl and helm are in {programs}:
  export KUBECONFIG={node.kubeconfig} PATH={programs}:$PATH
  kubectl get llm
  kubectl port-forward service/smollm2 8000:80
make cluster-down removes it all."""
    )


if __name__ == "__main__":
    sys.exit(main())
