"""Token and position lookups."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from quire_server.models.modules.linear import TableLinear, TensorReader, take_rows
from quire_server.models.planning.linear_method import UnquantizedMethod
from quire_server.models.planning.parts import TablePlan


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
    """Rows of the output layer's weight, however that is stored: tied weights are stored once."""

    __slots__ = ("_head",)

    def __init__(self, head: TableLinear) -> None:
        self._head = head

    @property
    def size_bytes(self) -> int:
        return 0

    def __call__(self, ids: Tensor) -> Tensor:
        return self._head.look_up(ids)


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


def load_table(plan: TablePlan, rows: range, reader: TensorReader) -> TableEmbedding:
    """Load some rows of `module.weight`."""
    return TableEmbedding(take_rows(reader.read(f"{plan.name}.weight", reader.dtype), rows))


TABLE_LOADERS: dict[type, Callable[[TablePlan, range, TensorReader], Embedding]] = {UnquantizedMethod: load_table}
"""From a `LinearMethod` that can look up to what makes an embedding of a table that it stores."""
