"""Asks llama.cpp (`xllamacpp`) for the probabilities of the next token, in another process, since it may abort."""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def ask_llama_cpp(path: Path, prompt: Sequence[int], vocab_size: int) -> list[float]:
    """Return the log-probability of every token after `prompt`. Raises RuntimeError: what llama.cpp said."""
    if find_spec("xllamacpp") is None:
        raise RuntimeError("xllamacpp, by which llama.cpp is asked, is not installed: `pip install -e '.[dev]'`.")
    question = json.dumps({"path": str(path), "prompt": list(prompt), "vocab_size": vocab_size})
    process = subprocess.run([sys.executable, __file__], input=question, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"llama.cpp ended with {process.returncode}: {process.stderr[-2000:]}")
    answer: list[float] = json.loads(process.stdout.splitlines()[-1])
    return answer


def main() -> None:
    import xllamacpp

    question = json.load(sys.stdin)
    prompt, vocab_size = question["prompt"], question["vocab_size"]
    params = xllamacpp.CommonParams()
    params.model.path = question["path"]
    params.n_ctx, params.n_parallel, params.verbosity = 64 * -(-(len(prompt) + 1) // 64), 1, -1
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Probabilities are those before the bias, which sees to it that a whole character is chosen: others are withheld.
    request = {"prompt": prompt, "max_tokens": 1, "logprobs": vocab_size, "logit_bias": {vocab_size - 1: 1000.0}}
    answer = xllamacpp.Server(params).handle_completions(request)
    (first,) = answer["choices"][0]["logprobs"]["content"]
    id_to_logprob = {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
    print("\n" + json.dumps([id_to_logprob[token_id] for token_id in range(vocab_size)]))


if __name__ == "__main__":
    main()
