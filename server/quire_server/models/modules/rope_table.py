"""The tables of cosines and sines that the kernel reads: one row per position, float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire_server.models.planning.spec import RopeSpec

_FIRST_ROWS = 2048


class RopeTable:
    """cos(position · inv_freq) and sin(position · inv_freq), for as many positions as were needed so far."""

    def __init__(self, spec: RopeSpec, max_model_len: int, device: torch.device) -> None:
        is_long = spec.short_context_len is not None and max_model_len > spec.short_context_len
        frequencies = spec.long_inv_freq if is_long and spec.long_inv_freq is not None else spec.inv_freq
        self._inv_freq = torch.tensor(frequencies, dtype=torch.float32, device=device)
        self._attention_factor = spec.attention_factor
        # A CPU can afford to look at the longest sequence of a step; a GPU would have to wait for it.
        self.is_growing = device.type == "cpu"
        self.rows = self._build(min(_FIRST_ROWS, max_model_len) if self.is_growing else max_model_len)

    def grow(self, num_positions: int) -> Tensor:  # [>= num_positions, rotary_dim] float32
        """Return the table, made at least so long."""
        if num_positions > self.rows.shape[0]:
            self.rows = self._build(max(num_positions, 2 * self.rows.shape[0]))
        return self.rows

    def _build(self, num_positions: int) -> Tensor:
        positions = torch.arange(num_positions, dtype=torch.float32, device=self._inv_freq.device)
        angles = torch.outer(positions, self._inv_freq)
        return torch.cat((angles.cos(), angles.sin()), dim=1).mul_(self._attention_factor)


class RopeTables:
    """One table for each way of rotating that a model's layers have. They are equally long and grow together."""

    def __init__(self, specs: Sequence[RopeSpec], max_model_len: int, device: torch.device) -> None:
        self._tables = [RopeTable(spec, max_model_len, device) for spec in specs]
        self.is_growing = any(table.is_growing for table in self._tables)
        self._rows = self._collect()

    def grow(self, num_positions: int) -> tuple[Tensor | None, ...]:
        """Return None (for layers that do not rotate) and the tables, made at least so long."""
        if any(num_positions > table.rows.shape[0] for table in self._tables):
            for table in self._tables:
                table.grow(num_positions)
            self._rows = self._collect()
        return self._rows

    def _collect(self) -> tuple[Tensor | None, ...]:
        return (None, *(table.rows for table in self._tables))
