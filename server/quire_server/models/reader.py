"""A checkpoint as the builder reads it: by the names of a weight map, on the model's device, checked against a plan."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quire_server.errors import CheckpointError
from quire_server.weights.checkpoint import Checkpoint
from quire_server.weights.stored import StoredTensor
from quire_server.weights.tensors import read_tensor


class CheckpointReader:
    """Implements `TensorReader`. Safe to read from several threads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        aliases: tuple[tuple[str, str], ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._names = checkpoint.tensor_names
        self._aliases = aliases
        self.device = device

    def find(self, name: str) -> StoredTensor:
        """Return where a tensor lies, under its name or an alias. Raises CheckpointError."""
        if name not in self._names:
            for prefix, other in self._aliases:
                alias = other + name.removeprefix(prefix)
                if name.startswith(prefix) and alias in self._names:
                    return self._checkpoint.stored(alias)
        return self._checkpoint.stored(name)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Check that every tensor is there, in its shape; return their size on disk. Raises CheckpointError."""
        num_bytes = 0
        for name, shape in shapes.items():
            stored = self.find(name)
            if stored.shape != shape:
                raise CheckpointError(
                    f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}; "
                    f"the config makes it {list(shape)}."
                )
            num_bytes += stored.num_bytes
        return num_bytes

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return read_tensor(self.find(name), dtype).to(self.device)
