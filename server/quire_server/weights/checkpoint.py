"""A checkpoint on disk, whatever its format: a config, and tensors under their Hugging Face names.

Owns: finding out what lies at a path. Imports no torch, so that a process that only needs the config or the tokenizer
stays small; `tensors.read_tensor` turns a `StoredTensor` into a torch tensor.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from quire_server.shared.errors import CheckpointError
from quire_server.weights.gguf import GgufCheckpoint
from quire_server.weights.safetensors import SafetensorsCheckpoint
from quire_server.weights.stored import StoredTensor

_PROJECTOR = "mmproj"
"""What llama.cpp's vision projectors are called: no model of their own."""


class Checkpoint(Protocol):
    """What a model is loaded from."""

    @property
    def source(self) -> Path:
        """The directory or file that a person would name."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """In the shape of Hugging Face's config.json."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """In the shape of generation_config.json; empty where the checkpoint has none."""
        ...

    @property
    def default_dtype(self) -> str:
        """The dtype that the weights were published in: bfloat16, float16 or float32."""
        ...

    @property
    def tensor_names(self) -> Collection[str]: ...

    @property
    def unknown_metadata(self) -> tuple[str, ...]:
        """Keys that the file has beside those from which `config` is made, and that may mean something."""
        ...

    def stored(self, name: str) -> StoredTensor:
        """Return where a tensor lies. Raises CheckpointError naming file and tensor."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the model directory or .gguf file at `path`. Raises CheckpointError, UnsupportedModelError."""
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufCheckpoint(path)
        raise CheckpointError(f"{path}: neither a model directory nor a .gguf file.")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory.")
    gguf_files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith(_PROJECTOR))
    has_safetensors = next(path.glob("*.safetensors"), None) is not None
    if gguf_files and not has_safetensors:
        return GgufCheckpoint(_only_model(gguf_files, path))
    if (path / "config.json").is_file():
        return SafetensorsCheckpoint(path)
    raise CheckpointError(f"{path}: has neither a config.json nor a .gguf file.")


def lookup_in(checkpoint: Checkpoint) -> Callable[[str], StoredTensor | None]:
    """Return what says where a tensor of the checkpoint lies; None: it has no such tensor."""
    return lambda name: checkpoint.stored(name) if name in checkpoint.tensor_names else None


def _only_model(gguf_files: list[Path], directory: Path) -> Path:
    """A directory may hold one model, in one file or in numbered parts."""
    first_parts = [file for file in gguf_files if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(first_parts) != 1:
        names = ", ".join(file.name for file in first_parts)
        raise CheckpointError(f"{directory}: holds several GGUF models ({names}); name one of them.")
    return first_parts[0]
