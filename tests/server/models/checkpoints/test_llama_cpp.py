"""GGUF files give the probabilities that llama.cpp gives them: whatever their metadata says, and whatever they lack."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from ask_llama_cpp import ask_llama_cpp
from tiny_gguf import add_byte_vocabulary, write_gguf
from torch import Tensor

VOCAB_SIZE = 272
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = GROUPED | {"rope_parameters": LLAMA3_ROPE}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
TOLERANCE = 1e-3


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)


CASES = [
    pytest.param("llama", "llama", GROUPED, {}, (), id="llama"),
    pytest.param("llama", "llama", GROUPED | {"tie_word_embeddings": True}, {}, (), id="tied"),
    pytest.param("llama", "llama", GROUPED, {"rope.scale_linear": 4.0}, (), id="scale_linear"),
    pytest.param("llama", "llama", GROUPED, {"rope.scaling.factor": 4.0}, (), id="factor-without-type"),
    pytest.param(
        "llama", "llama", GROUPED, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, (), id="linear"
    ),
    pytest.param(
        "llama", "llama", GROUPED, {"rope.scaling.factor": 2.0, "rope.scale_linear": 8.0}, (), id="old-and-new-factor"
    ),
    pytest.param("llama", "llama", GROUPED, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, (), id="none"),
    pytest.param("llama", "llama", GROUPED, YARN | {"rope.scaling.original_context_length": 16}, (), id="yarn"),
    pytest.param("llama", "llama", GROUPED, YARN, (), id="yarn-without-original"),
    pytest.param("llama", "llama", GROUPED, YARN | {"rope.scaling.attn_factor": 1.5}, (), id="yarn-attn_factor"),
    pytest.param("llama", "llama", LLAMA3, {}, (), id="llama3"),
    pytest.param("llama", "llama", LLAMA3, {"rope.scale_linear": 2.0}, (), id="llama3-and-linear"),
    pytest.param("llama", "llama", GROUPED | {"attention_bias": True}, {}, ("o_proj.bias",), id="llama-no-o-bias"),
    pytest.param("qwen2", "qwen2", GROUPED, {}, (), id="qwen2"),
    pytest.param("qwen2", "qwen2", GROUPED, {}, (".bias",), id="qwen2-without-biases"),
    pytest.param("qwen3", "qwen3", GROUPED | {"head_dim": 24}, {}, (), id="qwen3"),
    pytest.param("gemma", "gemma", GROUPED | {"head_dim": 24}, {}, (), id="gemma"),
    pytest.param("gemma", "gemma", GROUPED | {"head_dim": 24}, {"rope.scale_linear": 2.0}, (), id="gemma-linear"),
    pytest.param(
        "gemma2",
        "gemma2",
        GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
        {},
        (),
        id="gemma2",
    ),
    pytest.param("gpt_neox", "gptneox", SIZES, {}, (), id="gptneox"),
    pytest.param("gpt_neox", "gptneox", SIZES, {"rope.scaling.factor": 4.0}, (), id="gptneox-linear"),
]


@pytest.mark.parametrize(("model_type", "architecture", "fields", "metadata", "missing"), CASES)
def test_probabilities_are_those_of_llama_cpp(
    model_type: str,
    architecture: str,
    fields: Mapping[str, Any],
    metadata: Mapping[str, Any],
    missing: tuple[str, ...],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
    tmp_path: Path,
) -> None:
    def edit(writer: gguf.GGUFWriter, state: dict[str, Tensor]) -> None:
        add_byte_vocabulary(writer, VOCAB_SIZE)
        for key, value in metadata.items():
            add(writer, f"{architecture}.{key}", value)
        for name in [name for name in state if missing and name.endswith(missing)]:
            del state[name]

    tiny = build_tiny_model(model_type, **fields)
    tiny.path, prompt = tmp_path / "model.gguf", prompt_of(40)
    write_gguf(tiny.path, architecture, tiny.reference, edit=edit)
    ours = harness(tiny.load()).prefill(prompt)[-1].log_softmax(-1)
    expected = torch.tensor(ask_llama_cpp(tiny.path, prompt, VOCAB_SIZE))
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)
