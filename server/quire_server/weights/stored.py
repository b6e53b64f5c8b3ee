"""What every checkpoint format speaks: tensors as they lie in a mapped file, under Hugging Face's names. No torch."""

import json
import mmap
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from quire_contract.nesting import bounded_nesting
from quire_server.shared.errors import CheckpointError

_WORD_BYTES = 8


class RowOrder(NamedTuple):
    """How the rows on disk differ from Hugging Face's order. Undone when the tensor is read."""

    kind: Literal["interleaved_rope", "stacked_qkv"]
    """interleaved_rope: within a head, rows i and i + dim/2 were made neighbours (GGUF, Llama).
    stacked_qkv: [3, heads, dim] where Hugging Face has [heads, 3, dim] (GGUF, GPT-NeoX)."""
    num_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as it lies in a mapped file."""

    name: str
    """Hugging Face's."""
    shape: tuple[int, ...]
    encoding: str
    """F32, BF16, … or a GGUF block type such as Q4_K."""
    file: Path
    mapping: mmap.mmap
    offset: int
    num_bytes: int
    row_order: RowOrder | None = None
    value_offset: float = 0.0
    """Added to the stored values to give Hugging Face's (GGUF stores 1 + weight for Gemma's norms: −1)."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def holds_same(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors are the same, byte for byte."""
    if any(getattr(one, name) != getattr(other, name) for name in ("encoding", "shape", "row_order", "value_offset")):
        return False
    left, right = (memoryview(each.mapping)[each.offset : each.offset + each.num_bytes] for each in (one, other))
    num_whole = one.num_bytes // _WORD_BYTES * _WORD_BYTES  # by words, which is three times faster than by slices
    is_same = left[:num_whole].cast("Q") == right[:num_whole].cast("Q")
    return is_same and left[num_whole:] == right[num_whole:]


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file. Private and writable, so that torch may view it; nothing writes to it.

    Raises CheckpointError.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError as error:
        raise CheckpointError(f"{path}: the file is empty.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError."""
    try:
        with bounded_nesting():
            value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    return value
