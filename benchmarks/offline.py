"""Offline throughput on random weights: nano-vLLM's workload (seed 0, 100–1,024 tokens in and out), through `LLM`.

Random weights because speed does not depend on them, and never zeros because power does. `transformers` generates
the same number of tokens from a static batch of the same requests, in the same run.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import add_output_argument, finish, row

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}


def save_checkpoint(folder: Path, shape: str) -> None:
    """Save random weights of a shape, with a tokenizer of one token: the benchmark speaks token ids."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SHAPES[shape], eos_token_id=None, bos_token_id=None, dtype="bfloat16")
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))


def workload(shape: str, num_requests: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """nano-vLLM's `bench.py`: lengths uniform in [100, longest], drawn in its order."""
    source = random.Random(0)
    vocab_size = min(10_000, SHAPES[shape]["vocab_size"])
    prompts = [[source.randrange(vocab_size) for _ in range(source.randint(100, longest))] for _ in range(num_requests)]
    return prompts, [source.randint(100, longest) for _ in range(num_requests)]


def run_ours(folder: Path, prompts: Sequence[list[int]], lengths: Sequence[int]) -> float:
    """Returns output tokens per second."""
    from quire_server import LLM, SamplingParams

    llm = LLM(str(folder), max_model_len=4096, max_num_seqs=256, max_num_batched_tokens=16384)
    llm.generate([prompts[0]], SamplingParams(max_tokens=2, temperature=0.6), use_tqdm=False)
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n, detokenize=False) for n in lengths]
    started = time.perf_counter()
    llm.generate(list(prompts), params, use_tqdm=False)
    return sum(lengths) / (time.perf_counter() - started)


def run_transformers(folder: Path, prompts: Sequence[list[int]], lengths: Sequence[int], device: str) -> float:
    """Static batches of 16, cut to equal lengths, so that no padding counts against it."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    made = 0
    started = time.perf_counter()
    for start in range(0, len(prompts), 16):
        batch, wanted = prompts[start : start + 16], lengths[start : start + 16]
        cut = min(len(p) for p in batch)
        tokens = torch.tensor([p[:cut] for p in batch], device=device)
        count = sum(wanted) // len(wanted)
        with torch.inference_mode():
            mask = torch.ones_like(tokens)
            model.generate(
                tokens, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )
        made += count * len(batch)
    return made / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--longest", type=int, default=1024)
    add_output_argument(parser)
    arguments = parser.parse_args()
    prompts, lengths = workload(arguments.shape, arguments.num_requests, arguments.longest)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(folder, arguments.shape)
        ours = run_ours(folder, prompts, lengths)
        theirs = run_transformers(folder, prompts, lengths, arguments.device)
    parameters = {"shape": arguments.shape, "num_requests": arguments.num_requests, "longest": arguments.longest}
    print(f"ours {ours:.0f} tokens/s, transformers {theirs:.0f} tokens/s: {ours / theirs:.2f}×")
    rows = [
        row("offline output", "ours", "tokens/s", [ours], **parameters),
        row("offline output", "transformers", "tokens/s", [theirs], **parameters),
    ]
    finish("offline", rows, save=arguments.save, device=arguments.device)


if __name__ == "__main__":
    main()
