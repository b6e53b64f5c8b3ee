"""Model directories: which files are read, and what is refused by name when one is broken."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quire_server.shared.errors import CheckpointError
from quire_server.weights.safetensors import SafetensorsCheckpoint, read_header
from quire_server.weights.tensors import read_tensor

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "b.weight": torch.linspace(-1, 1, 5, dtype=torch.float16),
    "c.bias": torch.tensor([True, False]),
    "d.scales": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
    "e.packed": torch.tensor([[-1, 1 << 20]], dtype=torch.int32),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_tensors_are_read_as_they_were_written(directory: Path) -> None:
    checkpoint = SafetensorsCheckpoint(directory)
    assert set(checkpoint.tensor_names) == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = read_tensor(checkpoint.stored(name))
        assert read.dtype == tensor.dtype
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(read_tensor(checkpoint.stored("a.weight"), torch.float32), TENSORS["a.weight"].float())


def test_configs(directory: Path) -> None:
    checkpoint = SafetensorsCheckpoint(directory)
    assert checkpoint.config == {"architectures": ["LlamaForCausalLM"]}
    assert checkpoint.generation_config == {}
    assert checkpoint.source == directory
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert SafetensorsCheckpoint(directory).generation_config == {"eos_token_id": [1, 2]}


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"dtype": "float16"}, "float16"), ({"torch_dtype": "torch.float32"}, "float32"), ({}, "bfloat16")],
)
def test_default_dtype(directory: Path, config: dict[str, Any], expected: str) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    assert SafetensorsCheckpoint(directory).default_dtype == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors", "consolidated.safetensors", "extra.safetensors"], ["model.safetensors"]),
        (["b.safetensors", "a.safetensors", "consolidated-0.safetensors"], ["a.safetensors", "b.safetensors"]),
    ],
)
def test_which_files_hold_the_weights(directory: Path, files: list[str], expected: list[str]) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "original").mkdir()
    for name in [*files, "original/x.safetensors"]:
        save_file({name: torch.zeros(1)}, directory / name)
    assert sorted(SafetensorsCheckpoint(directory).tensor_names) == expected


def test_the_index_decides(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"part\.safetensors: is missing"):
        _ = SafetensorsCheckpoint(directory).tensor_names
    save_file({"x": torch.zeros(1)}, directory / "part.safetensors")
    assert set(SafetensorsCheckpoint(directory).tensor_names) == {"x"}
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        _ = SafetensorsCheckpoint(directory).tensor_names


def test_pickled_weights_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights are not loaded"):
        _ = SafetensorsCheckpoint(directory).tensor_names


def test_a_missing_tensor_is_named(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{directory}: tensor z.weight is missing"):
        SafetensorsCheckpoint(directory).stored("z.weight")


@pytest.mark.parametrize("text", ["[]", "{", None])
def test_a_broken_config_is_named(directory: Path, text: str | None) -> None:
    path = directory / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        SafetensorsCheckpoint(directory)


def build_file(entry: Any, data: bytes = bytes(16)) -> bytes:
    header = json.dumps({"x.weight": entry}).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x01\x02", "not a safetensors file"),
        (struct.pack("<Q", 1 << 40) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 4) + b"{{{{", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (build_file(7), r"tensor x\.weight: its header entry is malformed"),
        (build_file({"dtype": "F32", "shape": [4]}), r"tensor x\.weight: its header entry is malformed"),
        (build_file({"dtype": "F4", "shape": [4], "data_offsets": [0, 16]}), r"tensor x\.weight is of type F4"),
        (build_file({"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}), "its 12 bytes do not make F32 of shape"),
        (build_file({"dtype": "F32", "shape": [4], "data_offsets": [-4, 12]}), "do not make F32"),
        (
            build_file({"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}),
            r"tensor x\.weight ends at byte .*cut short",
        ),
    ],
)
def test_a_corrupt_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"broken.safetensors.*{message}"):
        read_header(file)


def test_every_truncation_is_an_error(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    for size in range(1, len(data), 5):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_header(file)


def test_a_changed_order_of_keys_does_not_matter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = dict(reversed(json.loads(data[8 : 8 + size]).items()))
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    stored = read_header(file)
    assert torch.equal(read_tensor(stored["a.weight"]), TENSORS["a.weight"])


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_deeply_nested_config_is_named(directory: Path, name: str) -> None:
    (directory / name).write_text(f'{{"x": {NESTED}}}')
    with pytest.raises(CheckpointError, match=f"{name}.*nested too deeply"):
        _ = SafetensorsCheckpoint(directory).generation_config


def test_a_deeply_nested_header_is_named(tmp_path: Path) -> None:
    header = f'{{"__metadata__": {NESTED}}}'.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*nested too deeply"):
        read_header(file)
