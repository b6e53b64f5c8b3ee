"""Closed-loop serving: ours over HTTP against `transformers` generate with static batches, alternating in one run.

Random prompts of 128 tokens, 128 tokens out, greedy, at concurrency 1, 16 and 64. The client shares the machine.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from client import random_prompts
from common import Row, add_output_argument, finish, read_bandwidth, row
from server import measure_served

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128


class Transformers:
    """The peer: `generate` on batches of as many requests as the concurrency, no HTTP, same weights and threads."""

    def __init__(self, model: Path, device: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from quire_server.weights.checkpoint import open_checkpoint
        from quire_server.weights.tensors import read_tensor

        # The same weights from the same file: transformers would need another package to read a GGUF.
        checkpoint = open_checkpoint(model)
        config = AutoConfig.for_model(**checkpoint.config)
        weights = {n: read_tensor(checkpoint.stored(n), torch.bfloat16).clone() for n in checkpoint.tensor_names}
        loaded = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        loaded.load_state_dict(weights, strict=not config.tie_word_embeddings)
        loaded.tie_weights()
        self._model = loaded.to(device).eval()
        self._device = device
        self.weights_bytes = sum(p.numel() * p.element_size() for p in loaded.parameters())
        self.vocab_size = int(loaded.config.vocab_size)

    def run(self, prompts: Sequence[Sequence[int]], concurrency: int) -> tuple[list[float], float]:
        """Returns seconds per output token of each batch, and the wall time in seconds."""
        import torch

        tpots = []
        started = time.perf_counter()
        for start in range(0, len(prompts), concurrency):
            batch = torch.tensor(prompts[start : start + concurrency], device=self._device)
            began = time.perf_counter()
            with torch.inference_mode():
                self._model.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    max_new_tokens=OUTPUT_TOKENS,
                    min_new_tokens=OUTPUT_TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                )
            tpots.append((time.perf_counter() - began) / OUTPUT_TOKENS)
        return tpots, time.perf_counter() - started


def measure(arguments: argparse.Namespace) -> list[Row]:
    peer = Transformers(arguments.model, arguments.device)
    bandwidth = read_bandwidth() if arguments.device == "cpu" else None
    floor = peer.weights_bytes / bandwidth if bandwidth else None
    if bandwidth and floor:
        megabytes = peer.weights_bytes / 1e6
        print(f"memory {bandwidth / 1e9:.1f} GB/s, weights {megabytes:.0f} MB: floor {1e3 * floor:.1f} ms a step")
    rows: list[Row] = []
    for concurrency in arguments.concurrency:
        ours: dict[str, list[float]] = {"ttft": [], "tpot": [], "rate": []}
        theirs: dict[str, list[float]] = {"tpot": [], "rate": []}
        count = max(concurrency, 2) if concurrency < 16 else concurrency * 2
        for repeat in range(arguments.repeats):
            prompts = random_prompts(count, PROMPT_TOKENS, peer.vocab_size, seed=1000 * concurrency + repeat)
            timings, wall = measure_served(
                [str(arguments.model), "--device", arguments.device],
                prompts,
                random_prompts(concurrency, PROMPT_TOKENS, peer.vocab_size, seed=repeat),
                max_tokens=OUTPUT_TOKENS,
                concurrency=concurrency,
            )
            ours["ttft"] += [1e3 * t.ttft for t in timings]
            ours["tpot"] += [1e3 * t.tpot for t in timings]
            ours["rate"].append(count * OUTPUT_TOKENS / wall)
            tpots, wall = peer.run(prompts, concurrency)
            theirs["tpot"] += [1e3 * t for t in tpots]
            theirs["rate"].append(count * OUTPUT_TOKENS / wall)
        rows += report(concurrency, ours, theirs, floor)
    return rows


def report(
    concurrency: int, ours: dict[str, list[float]], theirs: dict[str, list[float]], floor: float | None
) -> list[Row]:
    made = [
        row("TTFT", "ours", "ms", ours["ttft"], concurrency=concurrency),
        row("TPOT", "ours", "ms", ours["tpot"], concurrency=concurrency),
        row("TPOT", "transformers", "ms", theirs["tpot"], concurrency=concurrency),
        row("output", "ours", "tokens/s", ours["rate"], concurrency=concurrency),
        row("output", "transformers", "tokens/s", theirs["rate"], concurrency=concurrency),
    ]
    if floor is not None:
        made[1] = replace(made[1], limit_share=1e3 * floor / made[1].p50)
    ratio = made[3].p50 / made[4].p50
    print(
        f"concurrency {concurrency:3d}: TTFT {made[0].p50:7.1f} ms  TPOT {made[1].p50:6.1f} ms  "
        f"{made[3].p50:7.0f} tokens/s  | transformers {made[2].p50:6.1f} ms {made[4].p50:7.0f} tokens/s  | {ratio:.2f}×"
        + (f"  TPOT = {made[1].p50 / (1e3 * floor):.2f} × floor" if floor else ""),
        flush=True,
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=2)
    add_output_argument(parser)
    arguments = parser.parse_args()
    finish("serving", measure(arguments), save=arguments.save, device=arguments.device)


if __name__ == "__main__":
    main()
