"""Model directories: which files are read, and what is refused by name when one is broken."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from quire_server.shared.errors import CheckpointError
from quire_server.weights.safetensors import SafetensorsCheckpoint, read_header
from quire_server.weights.stored import holds_same
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


@pytest.fixture
def index(directory: Path) -> Callable[[dict[str, Any]], None]:
    """Write an index over a directory without a single file."""
    (directory / "model.safetensors").unlink()
    return lambda content: (directory / "model.safetensors.index.json").write_text(json.dumps(content)) and None


def names_in(directory: Path) -> set[str]:
    return set(SafetensorsCheckpoint(directory).tensor_names)


def test_the_index_decides(directory: Path, index: Callable[[dict[str, Any]], None]) -> None:
    index({"weight_map": {"x": "part.safetensors"}})
    save_file({"y": torch.zeros(1)}, directory / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"part\.safetensors: is missing"):
        names_in(directory)
    save_file({"x": torch.zeros(1)}, directory / "part.safetensors")
    assert names_in(directory) == {"x"}


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"x": 5, "y": "part.safetensors"}}])
def test_an_index_that_is_none_is_named(
    directory: Path, index: Callable[[dict[str, Any]], None], content: dict[str, Any]
) -> None:
    index(content)
    with pytest.raises(CheckpointError, match=r"index\.json: has no weight_map"):
        names_in(directory)


@pytest.mark.parametrize(
    "weight_map",
    [
        pytest.param({"x": "b.safetensors", "y": "a.safetensors"}, id="exchanged"),
        pytest.param({"x": "a.safetensors", "y": "a.safetensors"}, id="all-in-one"),
        pytest.param({"x": "part-1.safetensors", "y": "part-2.safetensors"}, id="files-renamed"),
        pytest.param({"x": "a.safetensors", "y": "part-2.safetensors"}, id="one-renamed"),
    ],
)
def test_an_index_may_be_wrong_about_where_a_tensor_lies(
    directory: Path, index: Callable[[dict[str, Any]], None], weight_map: dict[str, str]
) -> None:
    index({"weight_map": weight_map})
    for name, file in (("x", "a"), ("y", "b"), ("adapter", "c")):
        save_file({name: torch.zeros(1)}, directory / f"{file}.safetensors")
    assert names_in(directory) == {"x", "y"}


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in `transformers`, which loads such a directory."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, dtype="float32"
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "part.safetensors"}}')
    expected = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.tensor_names) == set(expected)
    assert all(torch.equal(read_tensor(checkpoint.stored(name)), tensor) for name, tensor in expected.items())


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


@pytest.mark.parametrize("num_elements", [0, 1, 7, 8, 9, 64])
def test_the_same_bytes_are_the_same_tensor(tmp_path: Path, num_elements: int) -> None:
    one = torch.arange(num_elements, dtype=torch.uint8)
    save_file({"one": one, "copy": one.clone(), "wide": one.view(1, -1).clone()}, tmp_path / "m.safetensors")
    stored = read_header(tmp_path / "m.safetensors")
    assert holds_same(stored["one"], stored["copy"])
    assert not holds_same(stored["one"], stored["wide"])
    for index in range(num_elements):
        other = one.clone()
        other[index] += 1
        save_file({"other": other}, tmp_path / "o.safetensors")
        assert not holds_same(stored["one"], read_header(tmp_path / "o.safetensors")["other"])


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
