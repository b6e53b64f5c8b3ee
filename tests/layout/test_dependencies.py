"""What shipped code imports is declared by the extra that ships it; what is declared is imported, or said why not."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"quire_{area}" for area in ("cli", "contract", "gateway", "kernels", "kube", "operator", "server"))

PACKAGE_TO_EXTRAS = {
    "contract/quire_contract": (),
    "kube/quire_kube": ("operator",),
    "operator/quire_operator": ("operator",),
    "gateway/quire_gateway": ("gateway",),
    "server/quire_server": ("server", "download"),
    "kernels/quire_kernels": ("server", "cuda"),
    "cli/quire_cli": ("server", "gateway", "operator", "download", "dev"),
}
"""The `quire` command imports a part's packages only when it is asked for that part; `make demo` is for developers."""

NOT_IMPORTED = {
    "httptools": "uvicorn's parser of HTTP",
    "python-dateutil": "the bound of botocore, without which pip tries every version of its neighbours",
}
"""Declared, and imported by no shipped module: why it is there."""
NOT_DECLARED = {
    "botocore": "s3fs brings it, and pins the one version that it takes",
    "google": "google-auth, which gcsfs brings",
    "multidict": "aiohttp's own types",
}
"""Imported, and declared by no extra: whose part it is."""


def _declared(extra: str | None) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {_normalise(re.split(r"[<>=;\[ ]", each, maxsplit=1)[0]) for each in listed}


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _imported(package: Path) -> Iterator[tuple[str, str]]:
    """Yield (top-level module, file) of each import from outside, inside functions too."""
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names}:
                if top and top not in sys.stdlib_module_names and top not in OURS:
                    yield top, str(path.relative_to(ROOT))


@pytest.mark.parametrize("package", [path for path in PACKAGE_TO_EXTRAS if (ROOT / path).exists()])
def test_what_is_imported_is_declared(package: str) -> None:
    declared = _declared(None).union(*(_declared(extra) for extra in PACKAGE_TO_EXTRAS[package]))
    distributions = packages_distributions()
    for module, file in _imported(ROOT / package):
        if module in NOT_DECLARED:
            continue
        found = {_normalise(name) for name in distributions.get(module, [module])}
        assert found & declared, f"{file} imports {module}, which no extra of {package} declares"


@pytest.mark.parametrize("extra", [None, "server", "download", "gateway", "operator"])
def test_what_is_declared_is_imported(extra: str | None) -> None:
    distributions = packages_distributions()
    imported = {
        _normalise(name)
        for package in PACKAGE_TO_EXTRAS
        for module, _ in _imported(ROOT / package)
        for name in distributions.get(module, [])
    }
    assert _declared(extra) - imported - NOT_IMPORTED.keys() == set()
    assert not imported & NOT_IMPORTED.keys()
