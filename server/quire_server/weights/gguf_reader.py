"""GGUF containers, versions 2 and 3: metadata and where the tensors lie. Knows nothing of models, and imports no torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from quire_server.shared.errors import CheckpointError
from quire_server.weights.stored import map_file

_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_MAX_ARRAY_DEPTH = 16
"""Of arrays in arrays. No writer makes any."""


class BlockType(NamedTuple):
    """How ggml packs a run of elements."""

    name: str
    num_elements: int
    num_bytes: int


F32 = 0
"""ggml's number."""

BLOCK_TYPES = {
    F32: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}
"""The types that are read, by ggml's number."""

_OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""The types that ggml has beside these: refused by their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensorInfo:
    """Where a tensor lies. `shape` is in torch's order (slowest dimension first), ggml's reversed."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    """From the start of the file."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensorInfo]
    mapping: mmap.mmap


class _Cursor:
    """Walks the header. Reading past the end raises CheckpointError."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        self.position = 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid GGUF file: {what}.")

    def unpack(self, format: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from("<" + format, self.mapping, self.position)
        except struct.error as error:
            raise self.error("the header is cut short") from error
        self.position += struct.calcsize("<" + format)
        return values

    def integer(self, format: str) -> int:
        value: int = self.unpack(format)[0]
        return value

    def count(self) -> int:
        """A number of things that follow, each at least one byte: what cannot fit is nonsense, not an allocation."""
        count = self.integer("Q")
        if count > len(self.mapping) - self.position:
            raise self.error(f"it announces {count} items, more than it has bytes")
        return count

    def string(self) -> str:
        size = self.count()
        raw = self.mapping[self.position : self.position + size]
        self.position += size
        return raw.decode("utf-8", errors="replace")

    def strings(self, count: int) -> list[str]:
        """The hot path: vocabularies have hundreds of thousands of these."""
        mapping, position, end = self.mapping, self.position, len(self.mapping)
        unpack_size = struct.Struct("<Q").unpack_from
        values = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack_size(mapping, position)[0]
                if position > end:
                    raise self.error("a string runs past the end")
                values.append(mapping[start:position].decode("utf-8", errors="replace"))
        except struct.error as error:
            raise self.error("the header is cut short") from error
        self.position = position
        return values

    def value(self, type_id: int, depth: int = 0) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self.array(depth)
        if type_id not in _SCALAR_FORMATS:
            raise self.error(f"metadata of unknown type {type_id}")
        return self.unpack(_SCALAR_FORMATS[type_id])[0]

    def array(self, depth: int = 0) -> list[Any]:
        type_id = self.integer("I")
        count = self.count()
        if type_id == _STRING:
            return self.strings(count)
        if type_id in _SCALAR_FORMATS:
            return list(self.unpack(f"{count}{_SCALAR_FORMATS[type_id]}"))
        if type_id == _ARRAY and depth == _MAX_ARRAY_DEPTH:
            raise self.error(f"its arrays are nested more than {_MAX_ARRAY_DEPTH} deep")
        return [self.value(type_id, depth + 1) for _ in range(count)]


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's header; the tensors stay on disk. Raises CheckpointError."""
    cursor = _Cursor(path, map_file(path))
    if cursor.mapping[:4] != b"GGUF":
        raise cursor.error("it does not begin with GGUF")
    cursor.position = 4
    version = cursor.integer("I")
    if version not in (2, 3):
        raise cursor.error(f"version {version} is not supported (2 and 3 are)")
    num_tensors, num_entries = cursor.count(), cursor.count()
    metadata = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.integer("I"))
    tensors = _read_tensor_infos(cursor, num_tensors, metadata.get("general.alignment", 32))
    return GgufFile(path=path, version=version, metadata=metadata, tensors=tensors, mapping=cursor.mapping)


def _read_tensor_infos(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, GgufTensorInfo]:
    entries = []
    for _ in range(num_tensors):
        name = cursor.string()
        num_dims = cursor.integer("I")
        if num_dims > 4:
            raise cursor.error(f"tensor {name} has {num_dims} dimensions")
        entries.append((name, cursor.unpack(f"{num_dims}Q"), cursor.integer("I"), cursor.integer("Q")))
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.error(f"alignment {alignment}")
    data_start = -(-cursor.position // alignment) * alignment
    return {
        name: GgufTensorInfo(name=name, shape=dims[::-1], type_id=type_id, offset=data_start + offset)
        for name, dims, type_id, offset in entries
    }


def tensor_bytes(file: GgufFile, info: GgufTensorInfo) -> int:
    """Return a tensor's size. Raises CheckpointError: unknown type, rows of broken blocks, an end past the file's."""
    where = f"{file.path}: tensor {info.name}"
    block = BLOCK_TYPES.get(info.type_id)
    if block is None:
        known = ", ".join(block.name for block in BLOCK_TYPES.values())
        name = _OTHER_TYPES.get(info.type_id, f"ggml's number {info.type_id}")
        raise CheckpointError(
            f"{where} is of type {name}, which is not supported ({known} are).",
            hint="Choose the model's file of another quantisation, such as Q4_K_M or Q8_0.",
        )
    if info.shape and info.shape[-1] % block.num_elements:
        raise CheckpointError(f"{where}: rows of {info.shape[-1]} are not whole {block.name} blocks.")
    num_bytes = info.num_elements // block.num_elements * block.num_bytes
    if info.offset + num_bytes > len(file.mapping):
        raise CheckpointError(
            f"{where} ends at byte {info.offset + num_bytes}, but the file has {len(file.mapping)}: it is cut short.",
            hint="Download the file again.",
        )
    return num_bytes
