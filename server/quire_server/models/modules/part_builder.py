"""Turns the parts of a plan into what runs: linear layers, norms, tables, each tensor read once. Knows no kinds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire_server.models.modules.embedding import TABLE_LOADERS, Embedding, VocabularyShard
from quire_server.models.modules.linear import Linear, TensorReader, load_linear
from quire_server.models.modules.norm import LayerNorm, Norm, RmsNorm
from quire_server.models.planning.parts import LinearPlan, NormPlan, TablePlan
from quire_server.models.planning.sharding import ModelShare, table_rows
from quire_server.models.planning.spec import RopeSpec
from quire_server.shared.errors import UnsupportedModelError


class PartBuilder:
    """What a kind builds itself with. Safe to use from several threads."""

    def __init__(self, reader: TensorReader, share: ModelShare, ropes: Sequence[RopeSpec]) -> None:
        self.reader = reader
        self.share = share
        self._rope_to_index = {rope: index for index, rope in enumerate(ropes, start=1)}
        self._sizes: list[int] = []
        self._ones: dict[int, Tensor] = {}

    @property
    def num_parameter_bytes(self) -> int:
        """What the parts built so far hold."""
        return sum(self._sizes)

    def rope_index(self, rope: RopeSpec | None) -> int:
        """Return where `StepContext.cos_sin_caches` has the table of these rotations (None: of none)."""
        return 0 if rope is None else self._rope_to_index[rope]

    def linear(self, plan: LinearPlan) -> Linear:
        linear = load_linear(plan, self.share, self.reader)
        self._sizes.append(linear.size_bytes)
        return linear

    def table(self, plan: TablePlan) -> Embedding:
        rows = table_rows(plan, self.share)
        embedding = TABLE_LOADERS[type(plan.module.method)](plan, rows, self.reader)
        self._sizes.append(embedding.size_bytes)
        return self.of_shard(embedding, rows, plan)

    def of_shard(self, embedding: Embedding, rows: range, plan: TablePlan) -> Embedding:
        """Return the lookup of a table of which `embedding` holds some rows."""
        return embedding if len(rows) == plan.num_rows else VocabularyShard(embedding, rows)

    def norm(self, plan: NormPlan) -> Norm:
        spec = plan.spec
        weight = self._read_float32(f"{plan.module}.weight") if spec.has_weight else self._ones_of(plan.size)
        bias = self._read_float32(f"{plan.module}.bias") if spec.has_bias else None
        if spec.weight_offset:
            weight = weight + spec.weight_offset
        if spec.kind == "layer":
            return LayerNorm(weight, bias, spec.eps)
        if bias is not None:
            raise UnsupportedModelError(f"{plan.module}: an RMS norm with a bias is not supported.")
        return RmsNorm(weight, spec.eps)

    def _read_float32(self, name: str) -> Tensor:
        vector = self.reader.read(name, torch.float32).clone()  # not a view of the file
        self._sizes.append(vector.nbytes)
        return vector

    def _ones_of(self, size: int) -> Tensor:
        """The kernels want a weight; all norms that have none share this one."""
        return self._ones.setdefault(size, torch.ones(size, device=self.reader.device))
