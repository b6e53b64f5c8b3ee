"""Writes what is made from the chart and from the CustomResourceDefinition: `make chart`.

`crds/llmdeployment.yaml` → the chart's copy; the chart without values → `deploy/kustomize/quire.yaml`; the comments of
`values.yaml` → the table in the chart's README; the chart with each of `ci/*-values.yaml` → `e2e/chart/golden`.
Tests in `e2e/chart` hold all of it equal to that. Needs Helm: $HELM, or one on the PATH, or `make cluster`'s.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parents[1]
CHART: Final = ROOT / "charts/quire"
KUBE_VERSION: Final = "1.34.0"
NAMESPACE: Final = "quire-system"
_TABLE: Final = re.compile(r"(<!-- values -->\n).*?(<!-- /values -->\n)", re.DOTALL)
_DESCRIPTION: Final = "# -- "


class HelmError(Exception):
    """Helm is missing, or refuses. The message is its own."""


def find_helm() -> Path:
    """Return the Helm to use. Raises HelmError."""
    cache = Path(os.environ.get("QUIRE_CACHE") or Path.home() / ".cache" / "quire")
    for found in (os.environ.get("HELM"), shutil.which("helm"), cache / "cluster/bin/helm"):
        if found and Path(found).exists():
            return Path(found)
    raise HelmError("Helm is needed: put it on the PATH, name it by HELM, or run `make cluster` once")


def helm(*words: str | Path) -> str:
    """Run Helm and return what it prints. Raises HelmError."""
    done = subprocess.run([str(find_helm()), *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HelmError(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def render(*flags: str | Path, chart: Path = CHART, namespace: str = NAMESPACE) -> str:
    """Render the chart, its CustomResourceDefinition included. Raises HelmError."""
    return helm("template", "quire", chart, "--namespace", namespace, "--kube-version", KUBE_VERSION, *flags)


def build_outputs() -> dict[Path, str]:
    """Return the whole content of every file that is made here, in an order in which they can be written."""
    crd = (ROOT / "crds/llmdeployment.yaml").read_text()
    copy = CHART / "files/llmdeployment.yaml"
    if not copy.exists() or copy.read_text() != crd:
        copy.write_text(crd)  # the chart is rendered with it
    manifest = "# Written by `make chart` from charts/quire.\n" + render()
    readme = CHART / "README.md"
    table = "\n".join(_table(CHART / "values.yaml"))
    golden = {
        ROOT / "e2e/chart/golden" / values.name.replace("-values", ""): build_golden(values)
        for values in sorted((CHART / "ci").glob("*-values.yaml"))
    }
    return {
        **golden,
        copy: crd,
        ROOT / "deploy/kustomize/quire.yaml": re.sub(r"[ \t]+$", "", manifest, flags=re.MULTILINE),
        readme: _TABLE.sub(lambda found: f"{found[1]}{table}\n{found[2]}", readme.read_text()),
    }


def build_golden(values: Path) -> str:
    """Render one case, less what is a file of the chart word for word: the definition and the dashboard."""
    documents = []
    for document in yaml.safe_load_all(render("--values", values)):
        if document["metadata"]["name"] == "quire-dashboard":
            document["data"] = dict.fromkeys(document["data"], "files/dashboard.json")
        if document["kind"] != "CustomResourceDefinition":
            documents.append(document)
    documents.sort(key=lambda one: (one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]))
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)


def _table(values: Path) -> Iterator[str]:
    yield "| value | default | meaning |"
    yield "|---|---|---|"
    defaults = yaml.safe_load(values.read_text())
    for path, text in described_values(values):
        shown: Any = defaults
        for key in path:
            shown = shown[key]
        yield f"| `{'.'.join(path)}` | `{json.dumps(shown, ensure_ascii=False)}` | {text} |"


def described_values(values: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each value that a `# --` line describes, as a path of keys, in the file's order."""
    path: list[str] = []
    description = ""
    for line in values.read_text().splitlines():
        if line.strip().startswith(_DESCRIPTION):
            description = line.strip().removeprefix(_DESCRIPTION)
        elif key := re.match(r"( *)([A-Za-z][A-Za-z0-9]*):", line):
            path = [*path[: len(key[1]) // 2], key[2]]
            if description:
                yield tuple(path), description
            description = ""


def main() -> int:
    """Write the files, or with --check tell which are old. Exit codes: 0 done, 1 old or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    try:
        outputs = build_outputs()
    except HelmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    old = [path for path, text in outputs.items() if not path.exists() or path.read_text() != text]
    for path in old:
        print(f"{'old' if arguments.check else 'written'}: {path.relative_to(ROOT)}")
        if not arguments.check:
            path.write_text(outputs[path])
    return 1 if arguments.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
