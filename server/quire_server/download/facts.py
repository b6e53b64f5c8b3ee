"""What a model on the disk is: its path, its size and its shape. Reads headers and configs; torch is not needed.

The server unpacks GGUF blocks to its compute type when it loads them, so no model's stored form is kept.
"""

from pathlib import Path
from typing import Final

from quire_contract.model_facts import ModelFacts
from quire_contract.model_shape import FitError, ModelShape, shape_from_gguf, shape_from_hf_config
from quire_server.download.errors import ModelInvalidError
from quire_server.download.selection import gguf_parts, model_path
from quire_server.errors import CheckpointError
from quire_server.weights.gguf_reader import read_gguf, tensor_bytes
from quire_server.weights.safetensors import read_header, weight_files
from quire_server.weights.stored import read_json

_MAX_ERROR_CHARS: Final = 500
"""The facts must fit into a termination message, which has room for 4096 bytes."""


def read_facts(root: Path, name: str, revision: str | None) -> ModelFacts:
    """Look at the model in a directory, or at a .gguf file. `name` is where `root` is, or will be, in the volume.

    Raises:
        ModelInvalidError: there is no model, several, or one with broken or missing files.
    """
    path = model_path(root) if root.is_dir() else root
    shape, shape_error = None, ""
    try:
        shape = _gguf_shape(path) if path.suffix == ".gguf" and path.is_file() else _hf_shape(path)
    except CheckpointError as error:
        raise ModelInvalidError(str(error), hint=error.termination.hint) from error
    except FitError as error:
        shape_error = str(error)[:_MAX_ERROR_CHARS]
    inside = path.relative_to(root).as_posix()
    return ModelFacts(
        path=name if inside == "." else f"{name}/{inside}".removeprefix("./"),
        bytes=size_of(root if root.is_dir() else path),
        revision=revision,
        shape=shape,
        shape_error=shape_error,
    )


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a directory but hidden ones (markers, caches of libraries)."""
    if path.is_file():
        return sum(part.stat().st_size for part in gguf_parts(path))
    files = (file for file in path.rglob("*") if not file.relative_to(path).parts[0].startswith("."))
    return sum(file.stat().st_size for file in files if file.is_file())


def _hf_shape(directory: Path) -> ModelShape:
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: has neither a config.json nor one .gguf model.")
    config = read_json(directory / "config.json")
    for file in weight_files(directory):
        read_header(file)
    return shape_from_hf_config(config)


def _gguf_shape(path: Path) -> ModelShape:
    main, *others = (read_gguf(part) for part in gguf_parts(path))
    num_parts = main.metadata.get("split.count", 1)
    if num_parts > 1 and num_parts != 1 + len(others):
        raise CheckpointError(f"{path}: {1 + len(others)} of its {num_parts} parts are there.")
    sizes = {info.name: tensor_bytes(file, info) for file in (main, *others) for info in file.tensors.values()}
    return shape_from_gguf(main.metadata, sizes)
