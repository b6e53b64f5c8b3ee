"""Write the module list of docs/architecture.md from the modules' own first lines. A test holds the two equal."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
HEADING = "## Modules\n"
PACKAGES = {
    "contract/quire_contract": "what crosses process borders",
    "kube/quire_kube": "the Kubernetes API, spoken",
    "operator/quire_operator": "the LLMDeployment, read and judged; scaling",
    "gateway/quire_gateway": "the request-holding router",
    "server/quire_server": "the inference server",
    "kernels/quire_kernels": "one public function per op",
    "cli/quire_cli": "the `quire` command",
}


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.partition("\n")[0]


def build() -> str:
    """Return the section: a table per package, a line per module."""
    parts = []
    for package, purpose in PACKAGES.items():
        rows = [
            f"| `{path.relative_to(ROOT / package)}` | {first_line(path)} |"
            for path in sorted((ROOT / package).rglob("*.py"))
            if path.stat().st_size > 0 and path.name != "__init__.py"
        ]
        name = package.partition("/")[2]
        parts.append("\n".join([f"### `{name}`: {purpose}", "", "| module | owns |", "|---|---|", *rows]))
    sources = sorted(path.name for path in (ROOT / "kernels/quire_kernels/_cpu/csrc").iterdir())
    parts.append("Native sources (`_cpu/csrc`): " + ", ".join(f"`{name}`" for name in sources) + ".")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    head = PAGE.read_text().partition(HEADING)[0]
    PAGE.write_text(f"{head}{HEADING}\n{build()}")


if __name__ == "__main__":
    main()
