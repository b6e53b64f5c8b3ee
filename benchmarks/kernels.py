"""Kernels on this CPU: ours, torch's own and oneDNN's prepacked form in turn, beside a plain read of the same bytes.

A case is one thing that is measured; `linear_cases` shows how to add more. Its providers alternate in every round, in
random order, so that neither a busy neighbour nor a warm cache favours one of them.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from common import Row, add_output_argument, cpu_name, describe_machine, finish, row

from quire_kernels import backend_summary, linear, pack_weight
from quire_kernels._cpu import native

READ = "plain read"
OURS = "ours"

# SmolLM2-135M: (out_features, in_features) of qkv, o, gate_up and down, in each of 30 layers, and the output layer.
SMOLLM2_LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))
SMOLLM2_LINEARS = (*SMOLLM2_LAYER * 30, (49152, 576))

_read_memory = native.bind("quire_read_memory", [native.POINTER, native.INT64], native.INT64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One computation and who can do it. `num_bytes` is what it cannot avoid to read."""

    what: str
    parameters: dict[str, int]
    providers: dict[str, Callable[[], object]]
    num_bytes: int
    num_flops: int


def linear_cases(num_tokens: Sequence[int]) -> list[Case]:
    """All linear layers of one SmolLM2-135M step, bfloat16, at several numbers of tokens."""
    weights = [torch.randn(shape).to(torch.bfloat16) * 0.04 for shape in SMOLLM2_LINEARS]
    ours = [pack_weight(weight) for weight in weights]
    prepacked = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in weights]
    pointwise = torch.ops.mkldnn._linear_pointwise
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    read = plain_read(num_bytes)

    def case(count: int) -> Case:
        width_to_x = {width: torch.randn(count, width).to(torch.bfloat16) for width in (576, 1536)}
        inputs = [width_to_x[weight.shape[1]] for weight in weights]

        def run_ours() -> None:
            for x, packed in zip(inputs, ours, strict=True):
                linear(x, packed)

        def run_torch() -> None:
            for x, weight in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(x, weight)

        def run_onednn() -> None:
            for x, weight in zip(inputs, prepacked, strict=True):
                pointwise(x, weight, None, "none", [], "")

        return Case(
            what="linears",
            parameters={"num_tokens": count},
            providers={READ: read, OURS: run_ours, "onednn prepacked": run_onednn, "torch": run_torch},
            num_bytes=num_bytes,
            num_flops=2 * count * num_bytes // 2,
        )

    return [case(count) for count in num_tokens]


def pack_case() -> Case:
    """Packing all of those weights, which happens once at start-up."""
    weights = [torch.randn(shape).to(torch.bfloat16) for shape in SMOLLM2_LINEARS]
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return Case(
        what="pack_weight",
        parameters={"num_weights": len(weights)},
        providers={READ: plain_read(num_bytes), OURS: lambda: [pack_weight(weight) for weight in weights]},
        num_bytes=num_bytes,
        num_flops=0,
    )


def plain_read(num_bytes: int) -> Callable[[], object]:
    """All threads read as many bytes and do nothing with them: the memory limit at this moment."""
    memory = torch.randint(0, 1 << 60, (num_bytes // 8,))
    return lambda: _read_memory.call(memory.data_ptr(), memory.numel() * 8)


def measure(case: Case, *, seconds: float) -> list[Row]:
    """Run the providers of a case in turn for about so long; at least five rounds."""
    name_to_times: dict[str, list[float]] = {name: [] for name in case.providers}
    order = random.Random(0)
    stop = time.perf_counter() + seconds
    for run in case.providers.values():
        run()
    while time.perf_counter() < stop or len(name_to_times[READ]) < 5:
        for name in order.sample(sorted(case.providers), len(case.providers)):
            started = time.perf_counter()
            case.providers[name]()
            name_to_times[name].append((time.perf_counter() - started) * 1e3)
    rows = [row(case.what, name, "ms", times, **case.parameters) for name, times in name_to_times.items()]
    limit = next(r.p50 for r in rows if r.provider == READ)
    return [replace(r, limit_share=limit / r.p50) for r in rows]


def show(case: Case, rows: Sequence[Row]) -> None:
    """One line per provider."""
    ours = next(r.p50 for r in rows if r.provider == OURS)
    parameters = " ".join(f"{key}={value}" for key, value in case.parameters.items())
    for r in rows:
        speed = f"{case.num_bytes / r.p50 / 1e6:6.1f} GB/s"
        speed += f" {case.num_flops / r.p50 / 1e9:6.3f} TFLOP/s" if case.num_flops and r.provider != READ else ""
        print(
            f"{case.what:12} {parameters:16} {r.provider:17} p20 {r.p20:8.2f}  p50 {r.p50:8.2f}  p80 {r.p80:8.2f} ms  "
            f"{r.p50 / ours:5.2f}x ours  {r.limit_share or 0:4.0%} of plain read  {speed}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,4,16,64,256", help="numbers of tokens for the linear layers")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    add_output_argument(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    machine = describe_machine()
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT") if name in os.environ}
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads {threads or ''}, {backend_summary()}, {machine['versions']}"
    )
    if native.library() is None:
        parser.exit(1, "the native kernels are missing; run `python -m quire_kernels.build`\n")
    rows: list[Row] = []
    for case in [pack_case(), *linear_cases([int(count) for count in options.tokens.split(",")])]:
        measured = measure(case, seconds=options.seconds)
        show(case, measured)
        rows += measured
    finish("kernels", rows, save=options.save, isa=native.isa(), threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
