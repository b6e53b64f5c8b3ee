"""GGUF containers: what is read, and what is refused by name when a file is broken."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quire_server.shared.errors import CheckpointError
from quire_server.weights.gguf_reader import BLOCK_TYPES, GgufTensorInfo, read_gguf, tensor_bytes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.eps", 0.5)
    writer.add_bool("flag", True)
    writer.add_int64("big", -(1 << 40))
    writer.add_array("tokens", ["<s>", "é", "日本"])
    writer.add_array("types", [3, 1, 1])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_tensor("a.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b.weight", np.ones((2, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors(file: Path) -> None:
    gguf_file = read_gguf(file)
    assert gguf_file.version == 3
    metadata = gguf_file.metadata
    assert metadata["general.architecture"] == "llama"
    assert (metadata["llama.block_count"], metadata["llama.eps"], metadata["flag"]) == (3, 0.5, True)
    assert metadata["big"] == -(1 << 40)
    assert metadata["tokens"] == ["<s>", "é", "日本"]
    assert metadata["types"] == [3, 1, 1]
    assert metadata["nested"] == [[1, 2], [3]]
    info = gguf_file.tensors["a.weight"]
    assert info.shape == (3, 4)
    assert tensor_bytes(gguf_file, info) == 48
    assert struct.unpack_from("<12f", gguf_file.mapping, info.offset) == tuple(range(12))


def test_version_2_is_read_and_others_are_not(file: Path) -> None:
    data = file.read_bytes()
    for version in (1, 4, 0x03000000):
        file.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
        with pytest.raises(CheckpointError, match=f"version {version} is not supported"):
            read_gguf(file)
    file.write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    assert read_gguf(file).tensors.keys() == {"a.weight", "b.weight"}


def test_every_truncation_of_the_header_is_an_error(file: Path) -> None:
    data = file.read_bytes()
    header_end = read_gguf(file).tensors["a.weight"].offset - 64
    for size in range(1, header_end, 3):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=str(file)):
            read_gguf(file)


def test_a_tensor_past_the_end_is_named(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    gguf_file = read_gguf(file)
    with pytest.raises(CheckpointError, match=rf"{file}: tensor b\.weight ends at byte .* cut short"):
        tensor_bytes(gguf_file, gguf_file.tensors["b.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"GGML" + data[4:], "does not begin with GGUF"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "more than it has bytes"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "more than it has bytes"),
        (lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "more than it has bytes"),
        (lambda data: data.replace(b"big" + struct.pack("<I", 11), b"big" + struct.pack("<I", 99)), "unknown type 99"),
        (
            lambda data: data.replace(b"a.weight" + struct.pack("<I", 2), b"a.weight" + struct.pack("<I", 9)),
            "9 dimensions",
        ),
        (lambda data: b"", "empty"),
    ],
)
def test_a_corrupt_header_is_an_error(file: Path, change: Callable[[bytes], bytes], message: str) -> None:
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        read_gguf(file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type_id": 99}, r"tensor a\.weight is of type ggml's number 99, which is not supported \(F32, .*Q6_K"),
        ({"type_id": 8, "shape": (3, 40)}, r"rows of 40 are not whole Q8_0 blocks"),
    ],
)
def test_an_unreadable_tensor_is_named(file: Path, fields: dict[str, Any], message: str) -> None:
    info = GgufTensorInfo(**({"name": "a.weight", "shape": (3, 4), "offset": 0} | fields))
    with pytest.raises(CheckpointError, match=message):
        tensor_bytes(read_gguf(file), info)


@pytest.mark.parametrize("kind", [kind for kind in gguf.GGMLQuantizationType if kind not in BLOCK_TYPES])
def test_every_other_type_of_ggml_is_refused_by_its_name(file: Path, kind: gguf.GGMLQuantizationType) -> None:
    info = GgufTensorInfo(name="a.weight", shape=(3, 256), offset=0, type_id=int(kind))
    with pytest.raises(CheckpointError, match=rf"a\.weight is of type {kind.name}, which is not supported") as caught:
        tensor_bytes(read_gguf(file), info)
    assert "Q4_K_M" in (caught.value.termination.hint or "")


def test_arrays_in_arrays_are_bounded(file: Path) -> None:
    with file.open("r+b") as stream:
        data = stream.read()
    array_of_one_array = struct.pack("<IQ", 9, 1)
    entry = struct.pack("<Q", 4) + b"deep" + struct.pack("<I", 9) + array_of_one_array * 1100 + struct.pack("<IQ", 4, 0)
    num_tensors, num_entries = struct.unpack_from("<QQ", data, 8)
    file.write_bytes(data[:8] + struct.pack("<QQ", num_tensors, num_entries + 1) + entry + data[24:])
    with pytest.raises(CheckpointError, match="nested more than 16 deep"):
        read_gguf(file)
