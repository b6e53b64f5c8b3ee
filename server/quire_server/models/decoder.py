"""The one decoder: runs any `DecoderSpec` once its parts are loaded. Knows nothing of families, files or requests.

A pipeline stage is the same with fewer layers: hidden states come in where it has no embedding, and go out where it has
no head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire_server.models.attention import AttentionMetadata, KVCache, StepContext
from quire_server.models.modules.embedding import Embedding
from quire_server.models.modules.layers import DecoderLayer, add_and_norm, join
from quire_server.models.modules.linear import Linear
from quire_server.models.modules.norm import Norm
from quire_server.models.modules.rope_table import RopeTables
from quire_server.models.planning.sharding import ModelShare
from quire_server.models.planning.spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParts:
    """What a decoder is made of."""

    token_embedding: Embedding | None
    """None: of a stage that is not the first."""
    position_embedding: Embedding | None = None
    project_in: Linear | None = None
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm | None
    project_out: Linear | None = None
    lm_head: Linear | None
    """None: of a stage that is not the last."""
    rope: RopeTables
    dtype: torch.dtype
    num_parameter_bytes: int
    share: ModelShare = field(default_factory=ModelShare)


class DecoderModel:
    """A loaded model, or one worker's share of it. Not to be called from two threads at once."""

    def __init__(self, spec: DecoderSpec, parts: DecoderParts) -> None:
        self.spec = spec
        """Of the whole model."""
        self.share = parts.share
        self.dtype = parts.dtype
        self.num_parameter_bytes = parts.num_parameter_bytes
        self._parts = parts
        # As the trained models had it: rounded to the dtype of the embedding.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=parts.dtype).item()

    def reserve_positions(self, num_positions: int) -> Tensor | None:
        """Make room for so many positions.

        Returns a rotary table, which is another one once the tables have grown; None: the model does not rotate.
        """
        return self._parts.rope.grow(num_positions)[-1]

    def embed_tokens(self, token_ids: Tensor) -> Tensor:  # [num_tokens] int64 -> [num_tokens, embedding_size]
        """Look tokens up, scaled as the layers want them: what `forward` takes in their place (`inputs_embeds`)."""
        embedding = self._parts.token_embedding
        assert embedding is not None
        hidden = embedding(token_ids)
        return hidden if self._embedding_scale == 1.0 else hidden.mul_(self._embedding_scale)

    def forward(
        self,
        token_ids: Tensor | None,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int64
        metadata: AttentionMetadata,
        kv_caches: Sequence[KVCache],  # [num_layers], of this stage
        *,
        inputs_embeds: Tensor | None = None,  # [num_tokens, embedding_size]; a later stage: [num_tokens, hidden_size]
    ) -> Tensor:  # [num_tokens, hidden_size]
        """Run the layers over the tokens of one step, and write their keys and values to the caches.

        `inputs_embeds` stands for looked-up tokens, as in `transformers`: already scaled; projection and learned
        positions are still to come. Of a stage that is not the first it is the result of the one before.
        """
        hidden, step = self._start(token_ids, positions, metadata, inputs_embeds)
        return self._end(*self._run(slice(None), hidden, None, step, kv_caches))

    def forward_with_states(
        self,
        token_ids: Tensor | None,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int64
        metadata: AttentionMetadata,
        kv_caches: Sequence[KVCache],  # [num_layers], of this stage
        *,
        state_layers: Sequence[int],
        inputs_embeds: Tensor | None = None,  # as in `forward`
    ) -> tuple[Tensor, list[Tensor]]:  # [num_tokens, hidden_size], all
        """Run `forward`, and return the hidden states after some layers too (what EAGLE 3 reads).

        `state_layers` are the model's numbers, of layers that this stage has: ValueError for others.
        """
        stage = self.share.stage(self.spec.num_layers)
        if not set(state_layers) <= set(stage):
            raise ValueError(f"of layers {list(state_layers)} not all are of {stage}")
        hidden, step = self._start(token_ids, positions, metadata, inputs_embeds)
        residual: Tensor | None = None
        states: dict[int, Tensor] = {}
        num_done = 0
        for layer in sorted(set(state_layers)):
            span = slice(num_done, layer - stage.start + 1)
            hidden, residual = self._run(span, hidden, residual, step, kv_caches)
            states[layer], num_done = join(hidden, residual), span.stop
        hidden, residual = self._run(slice(num_done, None), hidden, residual, step, kv_caches)
        return self._end(hidden, residual), [states[layer] for layer in state_layers]

    def compute_logits(
        self,
        hidden: Tensor,  # [num_rows, hidden_size]
    ) -> Tensor:  # [num_rows, vocab_size] float32
        """Return the scores of the next token for the given rows of `forward`'s result."""
        parts, scale, soft_cap = self._parts, self.spec.logit_scale, self.spec.logit_soft_cap
        assert parts.lm_head is not None
        if parts.project_out is not None:
            hidden = parts.project_out(hidden)
        logits = parts.lm_head(hidden, torch.float32)
        if scale != 1.0:
            logits.mul_(scale)
        if soft_cap is not None:
            logits.div_(soft_cap).tanh_().mul_(soft_cap)
        return logits

    def _start(
        self, token_ids: Tensor | None, positions: Tensor, metadata: AttentionMetadata, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, StepContext]:
        """Return the first layer's input, and what all layers share."""
        parts, rope = self._parts, self._parts.rope
        if inputs_embeds is None:
            assert token_ids is not None
            inputs_embeds = self.embed_tokens(token_ids)
        if parts.project_in is not None:
            inputs_embeds = parts.project_in(inputs_embeds)
        if parts.position_embedding is not None and self.spec.learned_positions is not None:
            inputs_embeds = parts.position_embedding(positions + self.spec.learned_positions.offset).add_(inputs_embeds)
        num_positions = metadata.max_seq_len
        if num_positions is None:
            num_positions = int(metadata.seq_lens.max()) if rope.is_growing else 0
        return inputs_embeds, StepContext(positions, rope.grow(num_positions), metadata)

    def _run(
        self, span: slice, hidden: Tensor, residual: Tensor | None, step: StepContext, kv_caches: Sequence[KVCache]
    ) -> tuple[Tensor, Tensor | None]:
        """Run some of the stage's layers, one after the other."""
        for layer, kv_cache in zip(self._parts.layers[span], kv_caches[span], strict=True):
            hidden, residual = layer(hidden, residual, step, kv_cache)
        return hidden, residual

    def _end(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        final_norm = self._parts.final_norm
        return join(hidden, residual) if final_norm is None else add_and_norm(final_norm, hidden, residual)[0]
