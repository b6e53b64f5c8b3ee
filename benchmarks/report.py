"""Write the README's table from the newest results in benchmarks/results, between its two markers."""

import json
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT

BEGIN = "<!-- benchmarks: begin (benchmarks/report.py) -->"
END = "<!-- benchmarks: end -->"


def newest(what: str) -> list[tuple[str, dict[str, Any]]]:
    """The newest results file of each machine, as (file name, content)."""
    by_machine: dict[str, Path] = {}
    for path in sorted(RESULTS.glob(f"*_{what}_*.json")):
        by_machine[path.stem.rsplit("_", 1)[-1]] = path
    return [(path.name, json.loads(path.read_text())) for path in by_machine.values()]


def serving_table(content: dict[str, Any]) -> list[str]:
    rows = {(r["what"], r["provider"], r["parameters"]["concurrency"]): r for r in content["rows"]}
    lines = [
        "| concurrency | TTFT | TPOT | share of memory limit | output tokens/s | transformers, static batch | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for concurrency in sorted({key[2] for key in rows}):
        ttft, tpot = rows["TTFT", "ours", concurrency], rows["TPOT", "ours", concurrency]
        ours, theirs = rows["output", "ours", concurrency], rows["output", "transformers", concurrency]
        share = f"{tpot['limit_share']:.0%}" if tpot["limit_share"] and concurrency == 1 else "–"
        lines.append(
            f"| {concurrency} | {ttft['p50']:.0f} ms | {tpot['p50']:.1f} ms | {share} | {ours['p50']:.0f} "
            f"| {theirs['p50']:.0f} | {ours['p50'] / theirs['p50']:.1f}× |"
        )
    return lines


def startup_line(content: dict[str, Any]) -> str:
    seconds = {r["what"]: r["p50"] for r in content["rows"]}
    return (
        f"Process start → port open {seconds['port open']:.2f} s, ready {seconds['ready']:.2f} s, first answer "
        f"{seconds['first answer']:.2f} s; a bare `import torch` takes {seconds['import torch']:.2f} s there."
    )


def build() -> str:
    parts: list[str] = []
    for name, content in newest("serving"):
        machine = content["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if k in ("torch", "transformers"))
        parts.append(f"{machine['device']}, {machine['cores']} cores, {versions}, {machine['date']} (`{name}`):")
        parts.append("\n".join(serving_table(content)))
        machine_name = name.removesuffix(".json").rsplit("_", 1)[-1]
        parts += [
            startup_line(other)
            for file, other in newest("startup")
            if file.removesuffix(".json").endswith(machine_name)
        ]
    return "\n\n".join(parts)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n\n{build()}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
