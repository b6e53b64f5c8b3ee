"""The one decoder: runs any `DecoderSpec` once its parts are loaded. Knows nothing of families, files or requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_server.models.attention import AttentionMetadata, KVCache, StepContext
from quire_server.models.embedding import Embedding
from quire_server.models.layers import DecoderLayer, add_and_norm
from quire_server.models.linear import Linear
from quire_server.models.norm import Norm
from quire_server.models.rope_table import RopeTable
from quire_server.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParts:
    """What a decoder is made of."""

    token_embedding: Embedding
    position_embedding: Embedding | None = None
    project_in: Linear | None = None
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm | None
    project_out: Linear | None = None
    lm_head: Linear
    rope: RopeTable | None = None
    dtype: torch.dtype
    num_parameter_bytes: int


class DecoderModel:
    """A loaded model. Not to be called from two threads at once."""

    def __init__(self, spec: DecoderSpec, parts: DecoderParts) -> None:
        self.spec = spec
        self.dtype = parts.dtype
        self.num_parameter_bytes = parts.num_parameter_bytes
        self._parts = parts
        # As the trained models had it: rounded to the dtype of the embedding.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=parts.dtype).item()

    def reserve_positions(self, num_positions: int) -> Tensor | None:
        """Make room for so many positions. Returns the rotary table, which is another one once it has grown."""
        rope = self._parts.rope
        return None if rope is None else rope.grow(num_positions)

    def forward(
        self,
        token_ids: Tensor,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int64
        metadata: AttentionMetadata,
        kv_caches: Sequence[KVCache],  # [num_layers]
    ) -> Tensor:  # [num_tokens, hidden_size]
        """Run the layers over the tokens of one step, and write their keys and values to the caches."""
        parts, rope = self._parts, self._parts.rope
        hidden = self._embed(token_ids, positions)
        if rope is None:
            step = StepContext(None, None, metadata)
        else:
            num_positions = metadata.max_seq_len
            if num_positions is None:
                num_positions = int(metadata.seq_lens.max()) if rope.is_growing else 0
            step = StepContext(positions, rope.grow(num_positions), metadata)
        residual: Tensor | None = None
        for layer, kv_cache in zip(parts.layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, step, kv_cache)
        if parts.final_norm is not None:
            return add_and_norm(parts.final_norm, hidden, residual)[0]
        return hidden if residual is None else hidden + residual

    def compute_logits(
        self,
        hidden: Tensor,  # [num_rows, hidden_size]
    ) -> Tensor:  # [num_rows, vocab_size] float32
        """Return the scores of the next token for the given rows of `forward`'s result."""
        parts, soft_cap = self._parts, self.spec.logit_soft_cap
        if parts.project_out is not None:
            hidden = parts.project_out(hidden)
        logits = parts.lm_head(hidden, torch.float32)
        if soft_cap is not None:
            logits.div_(soft_cap).tanh_().mul_(soft_cap)
        return logits

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        parts, learned_positions = self._parts, self.spec.learned_positions
        hidden = parts.token_embedding(token_ids)
        if self._embedding_scale != 1.0:
            hidden.mul_(self._embedding_scale)
        if parts.project_in is not None:
            hidden = parts.project_in(hidden)
        if parts.position_embedding is not None and learned_positions is not None:
            hidden = hidden.add_(parts.position_embedding(positions + learned_positions.offset))
        return hidden
