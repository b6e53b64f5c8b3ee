"""What lies at a path, and that finding out costs no torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from quire_server.shared.errors import CheckpointError
from quire_server.weights.checkpoint import open_checkpoint
from quire_server.weights.gguf import GgufCheckpoint
from quire_server.weights.safetensors import SafetensorsCheckpoint


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_directory_with_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert isinstance(open_checkpoint(tmp_path), SafetensorsCheckpoint)
    (tmp_path / "model.safetensors").touch()
    write_gguf(tmp_path / "also.gguf")
    assert isinstance(open_checkpoint(tmp_path), SafetensorsCheckpoint)


def test_a_gguf_file_or_a_directory_of_one(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    assert open_checkpoint(file).source == file
    (tmp_path / "config.json").write_text("{}")
    write_gguf(tmp_path / "mmproj-model.gguf")
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.source == file


def test_parts_count_as_one_model(tmp_path: Path) -> None:
    for part in (1, 2):
        write_gguf(tmp_path / f"model-0000{part}-of-00002.gguf")
    assert open_checkpoint(tmp_path).source.name == "model-00001-of-00002.gguf"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path / "nowhere", "no such file or directory"),
        (lambda path: path, "neither a config.json nor a .gguf file"),
        (lambda path: (path / "model.bin").touch() or path / "model.bin", "neither a model directory nor a .gguf"),
        (
            lambda path: [write_gguf(path / "a.gguf"), write_gguf(path / "b.gguf"), path][-1],
            r"several GGUF models \(a\.gguf, b\.gguf\)",
        ),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, prepare: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(prepare(tmp_path))


def test_config_and_metadata_import_no_torch(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    code = (
        "import sys; from pathlib import Path\n"
        "from quire_server.weights.checkpoint import open_checkpoint\n"
        "from quire_server.models import registry\n"
        f"list(open_checkpoint(Path({str(file)!r})).tensor_names)\n"
        "sys.exit(', '.join({'torch', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""
