"""Metadata of GGUF files, key by key: followed, harmless, or refused by name. The judge is what llama.cpp reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quire_server.shared.errors import CheckpointError, UnsupportedModelError
from quire_server.weights.gguf import GgufCheckpoint

METADATA: dict[str, Any] = {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 1,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
}


def write(path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in ({f"{architecture}.{key}": value for key, value in METADATA.items()} | metadata).items():
        {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}[type(value)](
            key, value
        )
    for name, data in (tensors or {"token_embd.weight": np.zeros((10, 64), np.float32)}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def open_with(tmp_path: Path) -> Callable[..., GgufCheckpoint]:
    return lambda *arguments, **fields: GgufCheckpoint(write(tmp_path / "model.gguf", *arguments, **fields))


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("llama", "attention.causal", False),
        ("llama", "attention.clamp_kqv", 8.0),
        ("llama", "attention.max_alibi_bias", 8.0),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.value_length", 32),
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "embedding_scale", 12.0),
        ("llama", "logit_scale", 0.0625),
        ("llama", "residual_scale", 0.22),
        ("llama", "rope.dimension_count", 8),
        ("llama", "rope.scaling.attn_factor", 1.5),
        ("qwen2", "rope.dimension_count", 8),
        ("qwen3", "nextn_predict_layers", 1),
        ("qwen3", "rope.scaling.yarn_ext_factor", 0.5),
        ("gemma2", "attention.sliding_window_pattern", 6),
        ("gemma2", "rope.freq_base_swa", 1e6),
        ("gptneox", "attention.value_length", 8),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    open_with: Callable[..., GgufCheckpoint], architecture: str, key: str, value: Any
) -> None:
    with pytest.raises(UnsupportedModelError, match=key.replace(".", r"\.")):
        _ = open_with(architecture, {f"{architecture}.{key}": value}).config


@pytest.mark.parametrize("kind", ["longrope", "spiral"])
def test_another_rope_scaling_is_refused_without_a_factor_too(
    open_with: Callable[..., GgufCheckpoint], kind: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=kind):
        _ = open_with("llama", {"llama.rope.scaling.type": kind}).config


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma", "gptneox"])
def test_what_means_nothing_else_is_taken(open_with: Callable[..., GgufCheckpoint], architecture: str) -> None:
    neutral = {
        "attention.causal": True,
        "attention.clamp_kqv": 0.0,
        "attention.key_length": 16,
        "attention.sliding_window": 4096,
        "attention.value_length": 16,
        "expert_count": 0,
        "logit_scale": 1.0,
        "pooling_type": 3,
        "rope.dimension_count": 16,
        "rope.freq_base": 5000.0,
        "rope.freq_base_swa": 5000.0,
        "rope.scaling.finetuned": True,
        "vocab_size": 10,
    }
    general = {"general.name": "m", "quantize.imatrix.file": "f", "tokenizer.ggml.model": "gpt2"}
    checkpoint = open_with(architecture, general | {f"{architecture}.{key}": each for key, each in neutral.items()})
    assert checkpoint.config["head_dim"] == 16
    assert checkpoint.unknown_metadata == ()


def test_what_is_not_known_is_told(open_with: Callable[..., GgufCheckpoint]) -> None:
    checkpoint = open_with("llama", {"llama.attention.novelty": 2.0, "vendor.secret": "x"})
    assert checkpoint.unknown_metadata == ("llama.attention.novelty", "vendor.secret")


@pytest.mark.parametrize("key", ["block_count", "rope.freq_base", "rope.scaling.factor", "attention.key_length"])
def test_a_text_is_no_number(open_with: Callable[..., GgufCheckpoint], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"llama\.{key} is 'many'"):
        _ = open_with("llama", {f"llama.{key}": "many"}).config


def test_rope_divisors_of_another_type_are_refused(open_with: Callable[..., GgufCheckpoint]) -> None:
    tensors = {"token_embd.weight": np.zeros((10, 64), np.float32), "rope_freqs.weight": np.ones(8, np.float16)}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not of type F32"):
        _ = open_with("llama", {}, tensors=tensors).config


def test_the_head_and_the_embedding_may_be_in_any_part(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    write(first, "llama", {"split.count": 2}, {"output_norm.weight": np.ones(64, np.float32)})
    rest = {"token_embd.weight": np.zeros((10, 64), np.float32), "output.weight": np.ones((10, 64), np.float32)}
    write(tmp_path / "m-00002-of-00002.gguf", "llama", {"split.count": 2}, rest)
    config = GgufCheckpoint(first).config
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (10, False)
