"""Ways to run the model over one step's batch, of which the runner takes the first that can.

A path makes the logits of the rows that sample. Eager execution takes any batch and is the specification of the others:
a recording on a CPU, a graph on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from quire_server.models.attention import KVCache
from quire_server.models.decoder import DecoderModel
from quire_server.runner.input_batch import InputBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOutput:
    """What a path makes of a batch. Valid until the next step."""

    logits: torch.Tensor | None  # [num_sampled, vocab_size] float32; None: no row samples
    hidden: torch.Tensor | None = None  # [num_tokens, hidden_size]; None: the path keeps none


class ForwardPath(Protocol):
    """One way to run a model. Chosen anew for every step."""

    def takes(self, batch: InputBatch) -> bool:
        """Say whether this path can run the batch."""
        ...

    def run(self, batch: InputBatch) -> ForwardOutput:
        """Run the model over a batch that it takes, writing keys and values to the cache."""
        ...


class EagerPath:
    """Runs any batch, operator by operator."""

    def __init__(self, model: DecoderModel, kv_caches: Sequence[KVCache]) -> None:
        self._model = model
        self._kv_caches = kv_caches

    def takes(self, batch: InputBatch) -> bool:
        return True

    def run(self, batch: InputBatch) -> ForwardOutput:
        hidden = self._model.forward(batch.token_ids, batch.positions, batch.metadata, self._kv_caches)
        if not batch.sampled.size:
            return ForwardOutput(logits=None, hidden=hidden)
        last = torch.from_numpy(batch.query_start_loc[batch.sampled + 1] - 1).to(hidden.device)
        return ForwardOutput(logits=self._model.compute_logits(hidden[last]), hidden=hidden)
