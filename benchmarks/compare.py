"""Two servers of ours in one run: another checkout, or other flags. A change that should cost nothing shows it here.

The two alternate, under the load of `serving.py`; ratios are of the medians over all repeats.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client import random_prompts
from common import Row, add_output_argument, finish, row
from server import measure_served
from serving import OUTPUT_TOKENS, PROMPT_TOKENS

VOCAB_SIZE = 32000
"""Prompts are made of the first ids, which every model has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two servers, and what was measured of it."""

    name: str
    python: str
    flags: Sequence[str]
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)

    def run(self, model: Path, concurrency: int, repeat: int) -> None:
        count = max(concurrency, 4) if concurrency < 16 else concurrency * 2
        prompts = random_prompts(count, PROMPT_TOKENS, VOCAB_SIZE, seed=1000 * concurrency + repeat)
        timings, wall = measure_served(
            [str(model), *self.flags],
            prompts,
            random_prompts(concurrency, PROMPT_TOKENS, VOCAB_SIZE, seed=repeat),
            max_tokens=OUTPUT_TOKENS,
            concurrency=concurrency,
            python=self.python,
        )
        self.ttft_ms.extend(1e3 * timing.ttft for timing in timings)
        self.tpot_ms.extend(1e3 * timing.tpot for timing in timings)
        self.rate.append(count * OUTPUT_TOKENS / wall)

    def rows(self, concurrency: int) -> list[Row]:
        return [
            row("TTFT", self.name, "ms", self.ttft_ms, concurrency=concurrency),
            row("TPOT", self.name, "ms", self.tpot_ms, concurrency=concurrency),
            row("output", self.name, "tokens/s", self.rate, concurrency=concurrency),
        ]


def measure(arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for concurrency in arguments.concurrency:
        ours = Side(name="ours", python=sys.executable, flags=shlex.split(arguments.flags))
        other = Side(name=arguments.other_name, python=arguments.other, flags=shlex.split(arguments.other_flags))
        for repeat in range(arguments.repeats):
            for side in (ours, other) if repeat % 2 else (other, ours):
                side.run(arguments.model, concurrency, repeat)
        rows += [*ours.rows(concurrency), *other.rows(concurrency)]
        print(f"concurrency {concurrency:3d}: {_describe(ours, other)}", flush=True)
    return rows


def _describe(ours: Side, other: Side) -> str:
    parts = []
    for name, unit, mine, theirs in (
        ("TTFT", "ms", ours.ttft_ms, other.ttft_ms),
        ("TPOT", "ms", ours.tpot_ms, other.tpot_ms),
        ("output", "tokens/s", ours.rate, other.rate),
    ):
        here, there = statistics.median(mine), statistics.median(theirs)
        parts.append(f"{name} {here:.1f} against {there:.1f} {unit} ({here / there:.3f}×)")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--other", default=sys.executable, help="interpreter of the other checkout's environment")
    parser.add_argument("--other-name", default="other", help="what the results call the other, such as its commit")
    parser.add_argument("--flags", default="", help="flags of ours, in one word")
    parser.add_argument("--other-flags", default="", help="flags of the other, in one word")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=4)
    add_output_argument(parser)
    arguments = parser.parse_args()
    finish("compare", measure(arguments), save=arguments.save, device="cpu")


if __name__ == "__main__":
    main()
