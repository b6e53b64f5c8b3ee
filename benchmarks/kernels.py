"""Kernels on this CPU: ours, torch's own and oneDNN's prepacked form in turn, beside a plain read of the same bytes.

A case is one thing that is measured; `linear_cases` shows how to add more. Its providers alternate in every round, in
random order, so that neither a busy neighbour nor a warm cache favours one of them. A peer that cannot run on this CPU
is left out with a word: what only it needs is therefore made in its first call.
"""

import argparse
import itertools
import math
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from common import Row, add_output_argument, cpu_name, describe_machine, finish, row

from quire_kernels import (
    backend_summary,
    gated_activation,
    linear,
    pack_weight,
    paged_attention,
    reference,
    rms_norm,
    rope_and_cache,
    sample_tokens,
)
from quire_kernels._cpu import native
from quire_kernels.testing import build_cos_sin_cache

GROUPS = ("linear", "decode", "prefill", "elementwise", "sampling")
READ = "plain read"
OURS = "ours"

# SmolLM2-135M: (out_features, in_features) of qkv, o, gate_up and down, in each of 30 layers, and the output layer.
SMOLLM2_LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))
SMOLLM2_LINEARS = (*SMOLLM2_LAYER * 30, (49152, 576))

# (num_heads, num_kv_heads, head_dim)
ATTENTION_SHAPES = {"smollm2-135m": (9, 3, 64), "llama-8b": (32, 8, 128)}
BLOCK_SIZE = 16
CACHE_BYTES = 400_000_000  # of KV that a decode case walks through, so that no CPU cache holds it

_read_memory = native.bind("quire_read_memory", [native.POINTER, native.INT64], native.INT64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One computation and who can do it. `num_bytes` is what it cannot avoid to read."""

    what: str
    parameters: dict[str, int | str]
    providers: dict[str, Callable[[], object]]
    num_bytes: int
    num_flops: int


def linear_cases(num_tokens: Sequence[int]) -> list[Case]:
    """All linear layers of one SmolLM2-135M step, bfloat16, at several numbers of tokens."""
    weights = [torch.randn(shape).to(torch.bfloat16) * 0.04 for shape in SMOLLM2_LINEARS]
    ours = [pack_weight(weight) for weight in weights]
    prepacked: list[torch.Tensor] = []
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
            if not prepacked:
                prepacked.extend(torch.ops.mkldnn._reorder_linear_weight(weight) for weight in weights)
            for x, weight in zip(inputs, prepacked, strict=True):
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

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


def decode_case(model: str, num_seqs: int, seq_len: int) -> Case:
    """One layer's decode attention over a shuffled cache, each call on another layer's keys and values."""
    num_heads, num_kv_heads, head_dim = ATTENTION_SHAPES[model]
    blocks_per_seq = seq_len // BLOCK_SIZE
    num_blocks = num_seqs * blocks_per_seq
    num_bytes = 2 * num_seqs * seq_len * num_kv_heads * head_dim * 2
    num_layers = max(1, min(16, CACHE_BYTES // num_bytes))
    shape = (num_layers, 2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    caches = huge_pages(math.prod(shape)).random_(0x3C00, 0x3E00).view(torch.bfloat16).view(shape)
    block_table = torch.randperm(num_blocks, dtype=torch.int32).view(num_seqs, blocks_per_seq)
    query = torch.randn(num_seqs, num_heads, head_dim).to(torch.bfloat16)
    metadata = block_table, torch.arange(num_seqs + 1, dtype=torch.int32), torch.full((num_seqs,), seq_len).int()
    contiguous = caches.view(num_layers, 2, num_seqs, seq_len, num_kv_heads, head_dim).transpose(3, 4)
    scale = head_dim**-0.5
    memory = torch.randint(0, 1 << 60, (num_layers, num_bytes // 8))

    def over_layers(call: Callable[[int], object]) -> Callable[[], object]:
        layers = itertools.cycle(range(num_layers))
        return lambda: call(next(layers))

    name_to_call: dict[str, Callable[[int], object]] = {
        READ: lambda layer: _read_memory.call(memory[layer].data_ptr(), num_bytes),
        OURS: lambda layer: paged_attention(query, *caches[layer], *metadata, scale=scale),
        "torch contiguous": lambda layer: torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(2), *contiguous[layer], enable_gqa=True
        ),
    }
    if seq_len <= 256:
        name_to_call["reference"] = lambda layer: reference.paged_attention_ref(
            query, *caches[layer], *metadata, scale=scale
        )
    return Case(
        what="decode",
        parameters={"model": model, "num_seqs": num_seqs, "seq_len": seq_len},
        providers={name: over_layers(call) for name, call in name_to_call.items()},
        num_bytes=num_bytes,
        num_flops=4 * num_seqs * seq_len * num_heads * head_dim,
    )


def prefill_case(model: str, num_tokens: int) -> Case:
    """One layer's prefill attention of one prompt."""
    num_heads, num_kv_heads, head_dim = ATTENTION_SHAPES[model]
    num_blocks = num_tokens // BLOCK_SIZE
    query = torch.randn(num_tokens, num_heads, head_dim).to(torch.bfloat16)
    caches = torch.randn(2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim).to(torch.bfloat16)
    metadata = (
        torch.randperm(num_blocks, dtype=torch.int32).view(1, num_blocks),
        torch.tensor([0, num_tokens], dtype=torch.int32),
        torch.tensor([num_tokens], dtype=torch.int32),
    )
    contiguous = caches.view(2, 1, num_tokens, num_kv_heads, head_dim).transpose(2, 3).contiguous()
    scale = head_dim**-0.5
    num_bytes = caches.numel() * 2 + 2 * query.numel() * 2
    providers: dict[str, Callable[[], object]] = {
        READ: plain_read(num_bytes),
        OURS: lambda: paged_attention(query, *caches, *metadata, scale=scale),
        "torch contiguous": lambda: torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None], *contiguous, is_causal=True, enable_gqa=True
        ),
    }
    if num_tokens <= 512:
        providers["reference"] = lambda: reference.paged_attention_ref(query, *caches, *metadata, scale=scale)
    return Case(
        what="prefill",
        parameters={"model": model, "num_tokens": num_tokens},
        providers=providers,
        num_bytes=num_bytes,
        num_flops=2 * num_tokens * (num_tokens + 1) * num_heads * head_dim,
    )


def elementwise_cases(num_tokens: int) -> list[Case]:
    """What stands between the products of a SmolLM2-135M layer."""
    num_heads, num_kv_heads, head_dim = ATTENTION_SHAPES["smollm2-135m"]
    x, residual, gate_up = (torch.randn(num_tokens, size).to(torch.bfloat16) for size in (576, 576, 3072))
    weight = torch.rand(576)
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(torch.bfloat16)
    heads = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    caches = torch.zeros(2, num_tokens // BLOCK_SIZE + 1, BLOCK_SIZE, num_kv_heads, head_dim, dtype=torch.bfloat16)
    tokens, cos_sin_cache = torch.arange(num_tokens), build_cos_sin_cache(8192, head_dim)
    rope_arguments = (*heads, tokens, cos_sin_cache, *caches, tokens)

    def case(what: str, ours: Callable[[], object], plain: Callable[[], object], num_bytes: int) -> Case:
        providers = {READ: plain_read(num_bytes), OURS: ours, "reference": plain}
        return Case(
            what=what, parameters={"num_tokens": num_tokens}, providers=providers, num_bytes=num_bytes, num_flops=0
        )

    return [
        case(
            "rms_norm",
            lambda: rms_norm(x, weight, 1e-5, residual),
            lambda: reference.rms_norm_ref(x, weight, 1e-5, residual),
            x.numel() * 8,
        ),
        case(
            "activation",
            lambda: gated_activation(gate_up, "silu"),
            lambda: reference.gated_activation_ref(gate_up, "silu"),
            gate_up.numel() * 3,
        ),
        case(
            "rope",
            lambda: rope_and_cache(*rope_arguments),
            lambda: reference.rope_and_cache_ref(*rope_arguments),
            qkv.numel() * 4,
        ),
    ]


def sampling_cases(num_rows: int, vocab_size: int) -> list[Case]:
    """One step's sampling, by the filters in use."""
    logits = torch.randn(num_rows, vocab_size) * 3
    uniform = torch.rand(num_rows)
    filters = {"greedy": (0.0, 0, 1.0, 0.0), "none": (1.0, 0, 1.0, 0.0), "top_k=50": (0.8, 50, 1.0, 0.0)}
    filters |= {"top_p=0.95": (0.8, 0, 0.95, 0.0), "min_p=0.05": (1.0, 0, 1.0, 0.05)}

    def case(name: str) -> Case:
        rows = [torch.full((num_rows,), value) for value in filters[name]]
        return Case(
            what="sampling",
            parameters={"filter": name, "num_rows": num_rows, "vocab_size": vocab_size},
            providers={
                READ: plain_read(logits.numel() * 4),
                OURS: lambda: sample_tokens(logits, *rows, uniform),
                "reference": lambda: reference.sample_tokens_ref(logits, *rows, uniform),
            },
            num_bytes=logits.numel() * 4,
            num_flops=0,
        )

    return [case(name) for name in filters]


def huge_pages(num_elements: int) -> torch.Tensor:
    """Return an int16 tensor in huge pages, as the server's KV cache is."""
    memory = mmap.mmap(-1, 2 * num_elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int16)


def plain_read(num_bytes: int) -> Callable[[], object]:
    """All threads read as many bytes and do nothing with them: the memory limit at this moment."""
    memory = torch.randint(0, 1 << 60, (num_bytes // 8,))
    return lambda: _read_memory.call(memory.data_ptr(), memory.numel() * 8)


def build_cases(group: str, num_tokens: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of a group; each is built when its turn comes, since they are large."""
    if group == "linear":
        yield pack_case()
        yield from linear_cases(num_tokens)
    elif group == "decode":
        for model, num_seqs, seq_len in itertools.product(ATTENTION_SHAPES, (16, 64), (256, 2048)):
            yield decode_case(model, num_seqs, seq_len)
    elif group == "prefill":
        for model, count in itertools.product(ATTENTION_SHAPES, (128, 512, 2048)):
            yield prefill_case(model, count)
    elif group == "elementwise":
        for count in num_tokens:
            yield from elementwise_cases(count)
    elif group == "sampling":
        for num_rows in (1, 64):
            yield from sampling_cases(num_rows, 49152)


def measure(case: Case, *, seconds: float) -> list[Row]:
    """Run the providers of a case in turn for about so long; at least five rounds."""
    case = replace(case, providers=dict(able_providers(case)))
    name_to_times: dict[str, list[float]] = {name: [] for name in case.providers}
    order = random.Random(0)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(name_to_times[READ]) < 5:
        for name in order.sample(sorted(case.providers), len(case.providers)):
            started = time.perf_counter()
            case.providers[name]()
            name_to_times[name].append((time.perf_counter() - started) * 1e3)
    rows = [row(case.what, name, "ms", times, **case.parameters) for name, times in name_to_times.items()]
    limit = next(r.p50 for r in rows if r.provider == READ)
    return [replace(r, limit_share=limit / r.p50) for r in rows]


def able_providers(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """Call each provider once, which warms it up; yield those that can run here. Only peers may be unable to."""
    for name, run in case.providers.items():
        try:
            run()
        except (AttributeError, RuntimeError) as error:  # a torch without the operator, a CPU without instructions
            if name in (READ, OURS):
                raise
            print(f"{case.what:12} {name} cannot run here and is left out: {str(error).splitlines()[0]}")
        else:
            yield name, run


def show(case: Case, rows: Sequence[Row]) -> None:
    """One line per provider."""
    ours = next(r.p50 for r in rows if r.provider == OURS)
    parameters = " ".join(f"{key}={value}" for key, value in case.parameters.items())
    for r in rows:
        speed = f"{case.num_bytes / r.p50 / 1e6:6.1f} GB/s"
        speed += f" {case.num_flops / r.p50 / 1e9:6.3f} TFLOP/s" if case.num_flops and r.provider != READ else ""
        print(
            f"{case.what:12} {parameters:16} {r.provider:17} p20 {r.p20:8.3f}  p50 {r.p50:8.3f}  p80 {r.p80:8.3f} ms  "
            f"{r.p50 / ours:5.2f}x ours  {r.limit_share or 0:4.0%} of plain read  {speed}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of cases (default: %(default)s)")
    parser.add_argument("--tokens", default="1,4,16,64,256", help="numbers of tokens, linear and elementwise")
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
    num_tokens = [int(count) for count in options.tokens.split(",")]
    for group in options.only.split(","):
        for case in build_cases(group, num_tokens):
            measured = measure(case, seconds=options.seconds)
            show(case, measured)
            rows += measured
    finish("kernels", rows, save=options.save, isa=native.isa(), threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
