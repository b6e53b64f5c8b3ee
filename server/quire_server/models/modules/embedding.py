"""Token and position lookups."""

from typing import Protocol

from torch import Tensor
from torch.nn import functional

import quire_kernels as kernels


class Embedding(Protocol):
    @property
    def size_bytes(self) -> int:
        """Return the memory held beyond what another layer holds already."""
        ...

    def __call__(self, ids: Tensor) -> Tensor:  # [num_tokens] int64 -> [num_tokens, size], freshly made
        ...


class TableEmbedding:
    """Rows of a plain table, possibly a view of the checkpoint's file."""

    __slots__ = ("_table",)

    def __init__(self, table: Tensor) -> None:
        self._table = table  # [num_rows, size]

    @property
    def size_bytes(self) -> int:
        return self._table.nbytes

    def __call__(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._table)


class TiedEmbedding:
    """Rows of the output layer's packed weight: tied weights are stored once."""

    __slots__ = ("_packed",)

    def __init__(self, packed: kernels.PackedWeight) -> None:
        self._packed = packed

    @property
    def size_bytes(self) -> int:
        return 0

    def __call__(self, ids: Tensor) -> Tensor:
        return kernels.gather_rows(self._packed, ids)


class VocabularyShard:
    """Some rows of a table, the others being zero: what all ranks return, added up, is the lookup."""

    __slots__ = ("_embedding", "_rows")

    def __init__(self, embedding: Embedding, rows: range) -> None:
        self._embedding = embedding
        self._rows = rows

    @property
    def size_bytes(self) -> int:
        return self._embedding.size_bytes

    def __call__(self, ids: Tensor) -> Tensor:
        is_held = (ids >= self._rows.start) & (ids < self._rows.stop)
        own = (ids - self._rows.start).clamp(0, len(self._rows) - 1)
        return self._embedding(own).mul_(is_held.unsqueeze(1))
