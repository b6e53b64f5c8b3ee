"""What a model on the disk is: its path, its size and its shape. Reads headers and configs; torch is not needed.

The shape comes from the families by which the server loads (`models.footprint`), so that the operator hears what the
server will find.
"""

from pathlib import Path
from typing import Final

import msgspec

from quire_contract.memory.model_shape import FitError, ModelShape
from quire_contract.model_facts import MAX_FACTS_BYTES, ModelFacts, encode_facts
from quire_server.download.errors import ModelInvalidError
from quire_server.download.selection import gguf_parts, model_path
from quire_server.models.footprint import read_model_shape
from quire_server.shared.errors import CheckpointError, UnsupportedModelError
from quire_server.weights.checkpoint import open_checkpoint
from quire_server.weights.gguf_reader import read_gguf, tensor_bytes

_MAX_ERROR_CHARS: Final = 500
"""The facts must fit into a termination message."""
_TOO_MANY_KINDS: Final = "its layers are of too many kinds to be told in a termination message"


def read_facts(root: Path, name: str, revision: str | None) -> ModelFacts:
    """Look at the model in a directory, or at a .gguf file. `name` is where `root` is, or will be, in the volume.

    Raises:
        ModelInvalidError: there is no model, several, or one with broken or missing files.
    """
    path = model_path(root) if root.is_dir() else root
    shape, shape_error = None, ""
    try:
        shape = _read_shape(path)
    except CheckpointError as error:
        raise ModelInvalidError(str(error), hint=error.termination.hint) from error
    except (UnsupportedModelError, FitError) as error:
        # Where the files lie now is nobody's concern: they may be about to be moved.
        shape_error = str(error).replace(str(path), path.name).removesuffix(".")[:_MAX_ERROR_CHARS]
    inside = path.relative_to(root).as_posix()
    facts = ModelFacts(
        path=name if inside == "." else f"{name}/{inside}".removeprefix("./"),
        bytes=size_of(root if root.is_dir() else path),
        revision=revision,
        shape=shape,
        shape_error=shape_error,
    )
    if len(encode_facts(facts)) > MAX_FACTS_BYTES:
        return msgspec.structs.replace(facts, shape=None, shape_error=_TOO_MANY_KINDS)
    return facts


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a directory but hidden ones (markers, caches of libraries)."""
    if path.is_file():
        return sum(part.stat().st_size for part in gguf_parts(path))
    files = (file for file in path.rglob("*") if not file.relative_to(path).parts[0].startswith("."))
    return sum(file.stat().st_size for file in files if file.is_file())


def _read_shape(path: Path) -> ModelShape:
    """Raises CheckpointError for files that are missing or broken, UnsupportedModelError or FitError for the rest."""
    if path.suffix == ".gguf" and path.is_file():
        _check_gguf(path)
    elif not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: has neither a config.json nor one .gguf model.")
    checkpoint = open_checkpoint(path)
    _ = checkpoint.tensor_names  # reads every header
    return read_model_shape(checkpoint)


def _check_gguf(path: Path) -> None:
    main, *others = (read_gguf(part) for part in gguf_parts(path))
    num_parts = main.metadata.get("split.count", 1)
    if num_parts > 1 and num_parts != 1 + len(others):
        raise CheckpointError(f"{path}: {1 + len(others)} of its {num_parts} parts are there.")
    for file in (main, *others):
        for info in file.tensors.values():
            tensor_bytes(file, info)  # of a known type, and not cut short
