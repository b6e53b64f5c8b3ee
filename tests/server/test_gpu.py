"""The engine on a CUDA device against `transformers` on the same device: `make test-gpu`."""

from pathlib import Path

import pytest
import torch

from quire_server import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = [[1, 2, 3], list(range(40, 90)), [200] * 17, [5]]


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    """These tests are asked for by name, so a machine without a device is a failure, not a skip."""
    assert torch.cuda.is_available(), "no CUDA device is visible to torch"
    return torch.device("cuda")


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to("cuda").eval()
    tokens = torch.tensor([prompt], device="cuda")
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return [int(t) for t in made[0, len(prompt) :]]


def test_batched_greedy_tokens_are_those_of_transformers(tiny_checkpoint: Path) -> None:
    llm = LLM(str(tiny_checkpoint), dtype="float32", max_model_len=256, num_gpu_blocks_override=64)
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False)
    made = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert made == [greedy(tiny_checkpoint, prompt, 32) for prompt in PROMPTS]


def test_sampling_with_a_seed_does_not_depend_on_the_batch(tiny_checkpoint: Path) -> None:
    llm = LLM(str(tiny_checkpoint), dtype="float32", max_model_len=256, num_gpu_blocks_override=64)
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=16, ignore_eos=True, detokenize=False)
    together = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    alone = [llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert together == alone
