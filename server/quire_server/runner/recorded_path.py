"""Decode steps, recorded once per batch size and replayed: the host's share of a step becomes one call.

Owns the recordings, their inputs' memory and their workspace. A step is taken if each of its requests computes one
token and samples the next. On a CPU with native kernels; a model that cannot be recorded is not taken from then on.
"""

import logging
from collections.abc import Sequence

import torch

from quire_kernels.recording import NotRecordableError, Recording, Workspace, record
from quire_server.models.attention import AttentionMetadata, KVCache
from quire_server.models.decoder import DecoderModel
from quire_server.runner.forward_path import ForwardOutput
from quire_server.runner.input_batch import InputBatch

logger = logging.getLogger(__name__)


class RecordedPath:
    """A `ForwardPath` for decode steps. One step at a time."""

    def __init__(
        self, model: DecoderModel, kv_caches: Sequence[KVCache], *, max_num_seqs: int, max_blocks_per_seq: int
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._workspace = Workspace()
        self._num_seqs_to_recording: dict[int, Recording] = {}
        self._position_table: torch.Tensor | None = None
        self._is_recordable = True
        self.num_replays = 0
        """Steps that were replayed so far."""
        self._token_ids = torch.zeros(max_num_seqs, dtype=torch.int64)
        self._positions = torch.zeros(max_num_seqs, dtype=torch.int64)
        self._slot_mapping = torch.zeros(max_num_seqs, dtype=torch.int64)
        self._seq_lens = torch.zeros(max_num_seqs, dtype=torch.int32)
        self._block_table = torch.zeros((max_num_seqs, max_blocks_per_seq), dtype=torch.int32)
        self._query_start_loc = torch.arange(max_num_seqs + 1, dtype=torch.int32)

    def takes(self, batch: InputBatch) -> bool:
        num_seqs = len(batch.request_ids)
        is_decode = len(batch.token_ids) == len(batch.sampled) == num_seqs
        return self._is_recordable and is_decode and not batch.wants_hidden

    def run(self, batch: InputBatch) -> ForwardOutput:
        num_seqs, metadata = len(batch.request_ids), batch.metadata
        num_blocks = metadata.block_table.shape[1]
        self._token_ids[:num_seqs] = batch.token_ids
        self._positions[:num_seqs] = batch.positions
        self._slot_mapping[:num_seqs] = metadata.slot_mapping
        self._seq_lens[:num_seqs] = metadata.seq_lens
        self._block_table[:num_seqs, :num_blocks] = metadata.block_table
        self._follow_position_table(metadata.max_seq_len or 0)
        recording = self._num_seqs_to_recording.get(num_seqs)
        if recording is None:
            return ForwardOutput(logits=self._record(num_seqs))
        self.num_replays += 1
        return ForwardOutput(logits=recording.replay())

    def _follow_position_table(self, num_positions: int) -> None:
        """Recordings have the table's address, so they end with it."""
        table = self._model.reserve_positions(num_positions)
        if table is not self._position_table:
            self._num_seqs_to_recording.clear()
            self._position_table = table

    def _record(self, num_seqs: int) -> torch.Tensor:
        try:
            recording = record(lambda: self._compute(num_seqs), self._workspace)
        except NotRecordableError as reason:
            logger.info("Decode steps are not recorded: %s", reason)
            self._is_recordable = False
            return self._compute(num_seqs)  # writes the same keys and values to the same slots once more
        self._num_seqs_to_recording[num_seqs] = recording
        return recording.result

    def _compute(self, num_seqs: int) -> torch.Tensor:
        metadata = AttentionMetadata(
            query_start_loc=self._query_start_loc[: num_seqs + 1],
            seq_lens=self._seq_lens[:num_seqs],
            block_table=self._block_table[:num_seqs],
            slot_mapping=self._slot_mapping[:num_seqs],
            max_seq_len=0,  # the table of positions is long enough already
        )
        token_ids, positions = self._token_ids[:num_seqs], self._positions[:num_seqs]
        return self._model.compute_logits(self._model.forward(token_ids, positions, metadata, self._kv_caches))
