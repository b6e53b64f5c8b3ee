"""A Hugging Face model directory: config.json and safetensors, in one file or many, mapped rather than read.

Reads the headers itself (they are JSON), so that names, shapes and sizes are known without torch and a broken file is
named. Format: https://github.com/huggingface/safetensors#format
"""

import json
import mmap
from collections.abc import Collection, Iterable
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from quire_contract.nesting import bounded_nesting
from quire_server.shared.errors import CheckpointError
from quire_server.weights.stored import StoredTensor, map_file, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
_DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class SafetensorsCheckpoint:
    """Implements `Checkpoint`. Headers are read when a tensor is first asked for; the config at once."""

    def __init__(self, directory: Path) -> None:
        self.source = directory
        self.config: dict[str, Any] = read_json(directory / "config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self.source / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def default_dtype(self) -> str:
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
        largest = max(self._tensors.values(), key=lambda tensor: tensor.num_bytes)
        return _DTYPE_NAMES.get(largest.encoding, "bfloat16")

    @property
    def tensor_names(self) -> Collection[str]:
        return self._tensors.keys()

    @property
    def unknown_metadata(self) -> tuple[str, ...]:
        return ()

    def stored(self, name: str) -> StoredTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.source}: tensor {name} is missing.")
        return tensor

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        tensors = read_tensors(self.source)
        if not tensors:
            raise CheckpointError(f"{self.source}: its safetensors files hold no tensors.")
        return tensors


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return where the tensors of a model directory lie. Raises CheckpointError.

    `model.safetensors` is all of it, as in `transformers`. Without it an index says which tensors there are; where they
    lie it may be wrong about. Without an index every file counts.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return read_header(single)
    if index.is_file():
        return _read_indexed(index)
    return _read_all(_weight_files(directory))


def _read_indexed(index: Path) -> dict[str, StoredTensor]:
    """Read the files that an index names, and look for what they lack in those that it does not."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from names of tensors to names of files.")
    named = [index.with_name(name) for name in sorted(set(weight_map.values()))]
    missing = [file for file in named if not file.is_file()]
    tensors = _read_all(file for file in named if file.is_file())
    if weight_map.keys() <= tensors.keys():
        return tensors
    others = (file for file in _safetensors_in(index.parent) if file not in named)
    tensors = {name: each for name, each in _read_all(others).items() if name in weight_map} | tensors
    if missing and not weight_map.keys() <= tensors.keys():
        raise CheckpointError(f"{missing[0]}: is missing, though {INDEX} names it.", hint="Download it again.")
    return tensors


def _read_all(files: Iterable[Path]) -> dict[str, StoredTensor]:
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def _safetensors_in(directory: Path) -> list[Path]:
    """Return the files at the top, but for `consolidated*`: the same weights in Mistral's or Meta's own layout."""
    return sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("consolidated"))


def _weight_files(directory: Path) -> list[Path]:
    """Return all files that hold weights. Raises CheckpointError where there are none."""
    files = _safetensors_in(directory)
    if files:
        return files
    pickled = min((file for kind in ("bin", "pt", "pth") for file in directory.glob(f"*.{kind}")), default=None)
    if pickled is not None:
        raise CheckpointError(
            f"{pickled}: pickled weights are not loaded, because loading them can run any code.",
            hint="Convert the checkpoint to safetensors.",
        )
    raise CheckpointError(f"{directory}: holds no .safetensors files.")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file. Raises CheckpointError naming file and tensor."""
    mapping = map_file(file)
    header_bytes = int.from_bytes(mapping[:8], "little")
    if len(mapping) < 8 or header_bytes > min(_MAX_HEADER_BYTES, len(mapping) - 8):
        raise CheckpointError(f"{file}: not a safetensors file, or cut short.")
    try:
        with bounded_nesting():
            header = json.loads(mapping[8 : 8 + header_bytes])
    except ValueError as error:
        raise CheckpointError(f"{file}: its safetensors header is not JSON: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its safetensors header is not an object.")
    header.pop("__metadata__", None)
    return {name: _parse_entry(file, mapping, 8 + header_bytes, name, entry) for name, entry in header.items()}


def _parse_entry(file: Path, mapping: mmap.mmap, data_start: int, name: str, entry: Any) -> StoredTensor:
    where = f"{file}: tensor {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: its header entry is malformed.") from error
    if dtype not in _DTYPE_BYTES:
        raise CheckpointError(f"{where} is of type {dtype}, which is not supported ({', '.join(_DTYPE_BYTES)} are).")
    if begin < 0 or end - begin != prod(shape) * _DTYPE_BYTES[dtype]:
        raise CheckpointError(f"{where}: its {end - begin} bytes do not make {dtype} of shape {list(shape)}.")
    if data_start + end > len(mapping):
        raise CheckpointError(
            f"{where} ends at byte {data_start + end}, but the file has {len(mapping)}: it is cut short.",
            hint="Download the file again.",
        )
    return StoredTensor(
        name=name,
        shape=shape,
        encoding=dtype,
        file=file,
        mapping=mapping,
        offset=data_start + begin,
        num_bytes=end - begin,
    )
