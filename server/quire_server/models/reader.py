"""A checkpoint as the builder reads it: by the names of a weight map, on the model's device, checked against a plan."""

from collections.abc import Iterable

import torch
from torch import Tensor

from quire_server.models.modules.linear import RawTensor
from quire_server.models.planning.parts import TensorPlan
from quire_server.models.planning.weight_map import Aliases, spellings
from quire_server.shared.errors import CheckpointError
from quire_server.weights.checkpoint import Checkpoint
from quire_server.weights.stored import StoredTensor
from quire_server.weights.tensors import read_bytes, read_tensor


class CheckpointReader:
    """Implements `TensorReader`. Safe to read from several threads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        aliases: Aliases,
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
        names = (each for each in spellings(name, self._aliases) if each in self._names)
        return self._checkpoint.stored(next(names, name))

    def check(self, tensors: Iterable[TensorPlan]) -> int:
        """Check that every tensor is there, as planned; return their size on disk. Raises CheckpointError."""
        num_bytes = 0
        for tensor in tensors:
            stored = self.find(tensor.name)
            if stored.shape != tensor.shape:
                raise CheckpointError(
                    f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}; "
                    f"the config makes it {list(tensor.shape)}."
                )
            if tensor.encoding is not None and stored.encoding != tensor.encoding:
                raise CheckpointError(
                    f"{stored.file}: tensor {stored.name} is of type {stored.encoding}; "
                    f"the config makes it {tensor.encoding}."
                )
            num_bytes += stored.num_bytes
        return num_bytes

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return read_tensor(self.find(name), dtype).to(self.device)

    def raw(self, name: str) -> RawTensor:
        stored = self.find(name)
        return RawTensor(stored.encoding, stored.shape, read_bytes(stored).to(self.device))
