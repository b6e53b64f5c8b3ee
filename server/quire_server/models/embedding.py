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
