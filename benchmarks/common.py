"""What every benchmark shares: the machine's description and limits, percentiles, result rows and files."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured thing. `limit_share` is the achieved share of the physical limit, where there is one."""

    what: str
    provider: str
    parameters: dict[str, Any]
    unit: str
    p20: float
    p50: float
    p80: float
    limit_share: float | None = None


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, by nearest rank."""
    ordered = sorted(values)
    p20, p50, p80 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


def row(what: str, provider: str, unit: str, values: Sequence[float], **parameters: Any) -> Row:
    p20, p50, p80 = percentiles(values)
    return Row(what=what, provider=provider, parameters=parameters, unit=unit, p20=p20, p50=p50, p80=p80)


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    flags = set(re.findall(r"\b(?:amx_bf16|avx512_bf16|avx2)\b", text))
    best = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx2") if flag in flags), "no AVX2")
    return f"{found.group(1).strip() if found else platform.processor()} ({best})"


def read_bandwidth(num_bytes: int = 270_000_000, repeats: int = 7) -> float:
    """Bytes per second that torch's threads read from memory: the best of several sums over a large tensor."""
    import torch

    values = torch.randint(0, 1 << 30, (num_bytes // 8,), dtype=torch.int64)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - started)
    return values.numel() * 8 / best


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    import os

    import torch

    versions = {}
    for name in ("torch", "transformers", "numpy", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.strip(),
        "date": datetime.date.today().isoformat(),
    }


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", metavar="MACHINE", help="write benchmarks/results/<date>_<what>_<MACHINE>.json")


def finish(what: str, rows: Sequence[Row], *, save: str | None, device: str = "cpu", **notes: Any) -> None:
    """Write the rows to a results file, if that was asked for."""
    if save is None:
        return
    machine = describe_machine(device)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{machine['date']}_{what}_{save}.json"
    path.write_text(json.dumps({"machine": machine, **notes, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    print(f"saved {path.relative_to(ROOT)}")
