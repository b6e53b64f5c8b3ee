"""A GGUF file in Hugging Face's words: config, generation config, names, parts."""

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
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def write(
    path: Path,
    architecture: str = "llama",
    *,
    metadata: dict[str, Any] | None = None,
    general: dict[str, Any] | None = None,
    tensors: dict[str, tuple[int, ...]] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (METADATA | (metadata or {})).items():
        if value is not None:
            add(writer, f"{architecture}.{key}", value)
    for key, value in (general or {}).items():
        add(writer, key, value)
    for name, shape in ({"token_embd.weight": (10, 64)} | (tensors or {})).items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def open_with(tmp_path: Path) -> Callable[..., GgufCheckpoint]:
    return lambda *arguments, **fields: GgufCheckpoint(write(tmp_path / "model.gguf", *arguments, **fields))


def test_config_of_llama(open_with: Callable[..., GgufCheckpoint]) -> None:
    config = open_with(metadata={"rope.freq_base": 5000.0}).config
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "vocab_size": 10,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    assert expected.items() <= config.items()
    assert config["rms_norm_eps"] == pytest.approx(1e-5)


def test_an_output_layer_unties(open_with: Callable[..., GgufCheckpoint]) -> None:
    assert open_with(tensors={"output.weight": (10, 64)}).config["tie_word_embeddings"] is False


@pytest.mark.parametrize(("num_layers", "expected"), [(26, 32), (46, 16)])
def test_only_gemma2_27b_scales_by_the_hidden_size(
    open_with: Callable[..., GgufCheckpoint], num_layers: int, expected: int
) -> None:
    fields = {"block_count": num_layers, "attention.key_length": 32}
    assert open_with("gemma2", metadata=fields).config["query_pre_attn_scalar"] == expected


def test_one_number_for_every_layer_is_one_number(open_with: Callable[..., GgufCheckpoint]) -> None:
    assert open_with(metadata={"attention.head_count_kv": [2, 2]}).config["num_key_value_heads"] == 2


def test_yarn(open_with: Callable[..., GgufCheckpoint]) -> None:
    fields = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
    }
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert open_with(metadata=fields).config["rope_scaling"] == expected


def test_generation_config(open_with: Callable[..., GgufCheckpoint]) -> None:
    general = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 5,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
    }
    checkpoint = open_with(general=general)
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [5, 7], "temperature": 0.5, "top_k": 20}
    assert checkpoint.config["eos_token_id"] == [5, 7]
    assert checkpoint.metadata["tokenizer.ggml.eos_token_id"] == 7


def test_names_are_those_of_hugging_face(open_with: Callable[..., GgufCheckpoint]) -> None:
    tensors = {
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.ffn_norm.weight": (64,),
        "output_norm.weight": (64,),
        "rope_freqs.weight": (8,),
        "blk.0.attn_rot_embd.weight": (8,),
    }
    assert set(open_with(tensors=tensors).tensor_names) == {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }


@pytest.mark.parametrize(
    ("arguments", "fields", "error", "message"),
    [
        (("mamba",), {}, UnsupportedModelError, r"'mamba' is not supported \(gemma, gemma2, gptneox, llama, qwen2"),
        ((), {"metadata": {"block_count": None}}, CheckpointError, r"llama\.block_count is missing"),
        ((), {"metadata": {"expert_count": 8}}, UnsupportedModelError, "mixture of experts"),
        (
            (),
            {"metadata": {"attention.head_count_kv": [1, 2]}},
            UnsupportedModelError,
            "head_count_kv differs by layer",
        ),
        (
            (),
            {"metadata": {"rope.scaling.type": "spiral", "rope.scaling.factor": 2.0}},
            UnsupportedModelError,
            "rope scaling 'spiral'",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    open_with: Callable[..., GgufCheckpoint],
    arguments: tuple[str, ...],
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        _ = open_with(*arguments, **fields).config


def test_a_missing_tensor_is_named(open_with: Callable[..., GgufCheckpoint]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.gguf: tensor model\.norm\.weight is missing"):
        open_with().stored("model.norm.weight")


def test_parts_are_one_checkpoint(tmp_path: Path) -> None:
    first = write(tmp_path / "m-00001-of-00002.gguf", general={"split.count": 2})
    write(tmp_path / "m-00002-of-00002.gguf", general={"split.count": 2}, tensors={"output_norm.weight": (64,)})
    assert "model.norm.weight" in GgufCheckpoint(first).tensor_names
    assert GgufCheckpoint(first).stored("model.norm.weight").file.name == "m-00002-of-00002.gguf"
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf"):
        _ = GgufCheckpoint(first).tensor_names
    with pytest.raises(CheckpointError, match="name the first"):
        _ = GgufCheckpoint(first.rename(tmp_path / "renamed.gguf")).tensor_names
