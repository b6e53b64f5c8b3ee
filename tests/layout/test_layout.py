"""The traps of the repository's layout, each of which breaks imports in a way that is hard to read."""

import operator
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_no_package_shadows_the_standard_librarys_operator() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert Path(operator.__file__).is_relative_to(sysconfig.get_path("stdlib"))


def test_every_package_is_typed_and_alone_in_its_folder() -> None:
    for area in ("operator", "gateway", "server", "kernels", "kube", "contract", "cli"):
        importable = [p for p in (ROOT / area).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
        assert [p.name for p in importable] == [f"quire_{area}"]
        assert (ROOT / area / f"quire_{area}" / "py.typed").exists()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("quire_server.api.app", ["torch", "transformers"]),
        ("quire_server.api_process.serve", ["torch", "transformers"]),
        ("quire_server.engine.core", ["torch", "numpy"]),
        ("quire_server.generation.messages", ["torch", "starlette", "uvicorn"]),
        ("quire_gateway.app", ["torch", "numpy", "quire_server"]),
        ("quire_operator.spec.llm_deployment", ["torch", "kubernetes", "kopf"]),
        ("quire_operator.plan.plan", ["torch", "kubernetes", "kopf", "aiohttp"]),
        ("quire_kube.api", ["kubernetes", "kopf", "aiohttp"]),
        ("quire_cli.__main__", ["torch", "starlette", "yaml"]),
        ("quire_server", ["torch", "starlette"]),
    ],
)
def test_importing_a_light_module_loads_nothing_heavy(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_architecture_page_has_a_line_for_every_module() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "modules.py"))
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert page.endswith(generator["build"]()), "run: python docs/modules.py"
