"""The runner's memory of its requests (`BatchState`), and one step's model input made from it (`InputBatch`).

The two are apart: rows are state, stable from a request's admission to its removal and changed by deltas alone; a
step's input is gathered from them, vectorised, and thrown away. Knows token ids and block ids; not what is sampled
from them (`sampler`), nor who gets blocks and tokens (the scheduler).

Invariants: a request holds one row from `add` to `remove`; `token_ids[row, :num_tokens[row]]` are its known tokens and
`block_table[row, :num_blocks[row]]` its blocks; block tables only grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quire_server.engine.step import NewRequestData, ScheduledRequest
from quire_server.models.attention import AttentionMetadata

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputBatch:
    """One step's input to the model. Requests keep the order in which the scheduler named them."""

    request_ids: list[str]  # [num_seqs]
    rows: IntArray  # [num_seqs] row of each request in the batch state
    context_lens: IntArray  # [num_seqs] tokens whose KV was there before this step
    query_lens: IntArray  # [num_seqs] tokens of this step
    query_start_loc: IntArray  # [num_seqs + 1]
    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    metadata: AttentionMetadata
    sampled: IntArray  # [num_sampled] indexes into the requests that sample a token in this step
    wants_hidden: bool
    """Somebody reads the hidden states of positions that sample nothing (log-probabilities of a prompt)."""


class BatchState:
    """Rows of the requests that are in the running batch. Big tables are committed as they are first written."""

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        max_blocks_per_seq = -(-max_model_len // block_size)
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)  # + 1: sampled from a full context
        self.block_table = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_logprobs: dict[int, int] = {}
        """Row to the number of alternatives, for the requests that ask for their prompts' log-probabilities."""
        self._block_size = block_size  # a power of two
        self._block_shift = block_size.bit_length() - 1
        self._device = device
        self._request_id_to_row: dict[str, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._request_id_to_row)

    def row_of(self, request_id: str) -> int:
        return self._request_id_to_row[request_id]

    def add(self, request: NewRequestData) -> int:
        """Give the request a row and write its tokens; blocks come with its share of the step. Returns the row."""
        if request.request_id in self._request_id_to_row:
            raise ValueError(f"request {request.request_id} already has a row")
        row = self._free_rows.pop()
        self._request_id_to_row[request.request_id] = row
        num_tokens = len(request.token_ids)
        self.token_ids[row, :num_tokens] = request.token_ids
        self.num_tokens[row] = num_tokens
        self.num_prompt_tokens[row] = request.num_prompt_tokens
        self.num_blocks[row] = 0
        if request.sampling_params.prompt_logprobs is not None:
            self.num_prompt_logprobs[row] = request.sampling_params.prompt_logprobs
        return row

    def remove(self, request_id: str) -> int | None:
        """Free the request's row and return it; None if the request never reached the runner."""
        row = self._request_id_to_row.pop(request_id, None)
        if row is not None:
            self._free_rows.append(row)
            self.num_prompt_logprobs.pop(row, None)
        return row

    def append_tokens(self, rows: IntArray, token_ids: IntArray) -> None:
        """Record one sampled token for each of the rows."""
        positions = self.num_tokens[rows]
        self.token_ids[rows, positions] = token_ids
        self.num_tokens[rows] = positions + 1

    def build(self, scheduled: Sequence[ScheduledRequest]) -> InputBatch:
        """Gather one step's input, after taking over the blocks that it brings. Drafts are not run yet."""
        num_seqs = len(scheduled)
        assert not any(share.draft_token_ids for share in scheduled)
        request_ids = [share.request_id for share in scheduled]
        to_row = self._request_id_to_row
        rows = np.fromiter((to_row[each] for each in request_ids), np.int64, num_seqs)
        for row, share in zip(rows.tolist(), scheduled, strict=True):
            if share.new_block_ids:
                self._append_blocks(row, share.new_block_ids)
        query_lens = np.fromiter((share.num_tokens for share in scheduled), np.int64, num_seqs)
        context_lens = np.fromiter((share.first_position for share in scheduled), np.int64, num_seqs)
        num_samples = np.fromiter((share.num_samples for share in scheduled), np.int64, num_seqs)
        seq_lens = context_lens + query_lens
        query_start_loc = np.zeros(num_seqs + 1, dtype=np.int64)
        np.cumsum(query_lens, out=query_start_loc[1:])
        num_tokens = int(query_start_loc[-1])
        if num_tokens == num_seqs:  # every request decodes
            token_rows, positions = rows, context_lens
        else:
            token_rows = np.repeat(rows, query_lens)
            positions = np.arange(num_tokens) + np.repeat(context_lens - query_start_loc[:-1], query_lens)
        return InputBatch(
            request_ids=request_ids,
            rows=rows,
            context_lens=context_lens,
            query_lens=query_lens,
            query_start_loc=query_start_loc,
            token_ids=self._to_device(self.token_ids[token_rows, positions].astype(np.int64)),
            positions=self._to_device(positions),
            metadata=self._build_metadata(rows, seq_lens, query_start_loc, token_rows, positions),
            sampled=np.flatnonzero(num_samples),
            wants_hidden=self._wants_hidden(rows, context_lens),
        )

    def _wants_hidden(self, rows: IntArray, context_lens: IntArray) -> bool:
        """Say whether a request computes positions of its prompt whose log-probabilities it asked for."""
        if not self.num_prompt_logprobs:
            return False
        asked = self.num_prompt_logprobs.keys()
        starts = zip(rows.tolist(), context_lens.tolist(), strict=True)
        return any(row in asked and start < self.num_prompt_tokens[row] - 1 for row, start in starts)

    def _build_metadata(
        self, rows: IntArray, seq_lens: IntArray, query_start_loc: IntArray, token_rows: IntArray, positions: IntArray
    ) -> AttentionMetadata:
        max_seq_len = int(seq_lens.max())
        max_blocks = -(-max_seq_len // self._block_size)
        block_index, block_offset = positions >> self._block_shift, positions & (self._block_size - 1)
        slot_mapping = self.block_table[token_rows, block_index].astype(np.int64) * self._block_size + block_offset
        return AttentionMetadata(
            query_start_loc=self._to_device(query_start_loc.astype(np.int32)),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            block_table=self._to_device(self.block_table[rows, :max_blocks]),
            slot_mapping=self._to_device(slot_mapping),
            max_seq_len=max_seq_len,
        )

    def _append_blocks(self, row: int, block_ids: Sequence[int]) -> None:
        start = int(self.num_blocks[row])
        self.block_table[row, start : start + len(block_ids)] = block_ids
        self.num_blocks[row] = start + len(block_ids)

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)
