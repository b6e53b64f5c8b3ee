"""Edits of logits that some requests ask for: allowed tokens, minimum length, bias, penalties.

Each processor keeps what it needs per row, for the rows that use it alone, and edits only the logits it must: all four
are sparse, so their cost follows the tokens named or seen, not the vocabulary. With no such row a step pays nothing.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from quire_server.engine.step import NewRequestData

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class LogitsProcessor(Protocol):
    """Per-row state and an in-place edit of [num_rows, vocab_size] float32 logits."""

    def add(self, row: int, request: NewRequestData) -> None:
        """Remember what the request asks for, if it concerns this processor."""

    def remove(self, row: int) -> None:
        """Forget the row."""

    def append(self, row: int, token_id: int) -> None:
        """Take note of a sampled token."""

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        """Edit the logits; `rows[i]` is the row whose logits are `logits[i]`."""

    def is_used_by(self, row: int) -> bool:
        """Whether `apply` would edit the row's logits."""


class AllowedTokens:
    """Everything but `allowed_token_ids` becomes impossible."""

    def __init__(self) -> None:
        self._token_ids: dict[int, IntArray] = {}

    def add(self, row: int, request: NewRequestData) -> None:
        allowed = request.sampling_params.allowed_token_ids
        if allowed is not None:
            self._token_ids[row] = np.unique(np.asarray(allowed, dtype=np.int64))

    def remove(self, row: int) -> None:
        self._token_ids.pop(row, None)

    def append(self, row: int, token_id: int) -> None:
        return

    def is_used_by(self, row: int) -> bool:
        return row in self._token_ids

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        used = [index for index, row in enumerate(rows) if row in self._token_ids]
        if not used:
            return
        flat, index = _flat_index(logits, used, [self._token_ids[rows[each]] for each in used])
        kept = flat[index]
        logits[torch.tensor(used, device=logits.device)] = -torch.inf
        flat[index] = kept


class MinTokens:
    """Until a request has made `min_tokens`, no token can end it."""

    def __init__(self) -> None:
        self._num_missing: dict[int, int] = {}
        self._stop_token_ids: dict[int, IntArray] = {}

    def add(self, row: int, request: NewRequestData) -> None:
        params = request.sampling_params
        num_missing = params.min_tokens - (len(request.token_ids) - request.num_prompt_tokens)
        stop_token_ids = {*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)}
        if num_missing > 0 and stop_token_ids:
            self._num_missing[row] = num_missing
            self._stop_token_ids[row] = np.fromiter(stop_token_ids, np.int64, len(stop_token_ids))

    def remove(self, row: int) -> None:
        self._num_missing.pop(row, None)
        self._stop_token_ids.pop(row, None)

    def append(self, row: int, token_id: int) -> None:
        if row in self._num_missing:
            self._num_missing[row] -= 1
            if self._num_missing[row] == 0:
                self.remove(row)

    def is_used_by(self, row: int) -> bool:
        return row in self._num_missing

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        used = [index for index, row in enumerate(rows) if row in self._num_missing]
        if used:
            flat, index = _flat_index(logits, used, [self._stop_token_ids[rows[each]] for each in used])
            flat[index] = -torch.inf


class LogitBias:
    """Adds to the logits of the tokens named."""

    def __init__(self) -> None:
        self._bias: dict[int, tuple[IntArray, FloatArray]] = {}

    def add(self, row: int, request: NewRequestData) -> None:
        bias = request.sampling_params.logit_bias
        if bias:
            token_ids = np.fromiter(bias.keys(), np.int64, len(bias))
            self._bias[row] = (token_ids, np.fromiter(bias.values(), np.float32, len(bias)))

    def remove(self, row: int) -> None:
        self._bias.pop(row, None)

    def append(self, row: int, token_id: int) -> None:
        return

    def is_used_by(self, row: int) -> bool:
        return row in self._bias

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        used = [index for index, row in enumerate(rows) if row in self._bias]
        if used:
            biases = [self._bias[rows[each]] for each in used]
            flat, index = _flat_index(logits, used, [token_ids for token_ids, _ in biases])
            before = flat[index]
            biased = before + _to_device(np.concatenate([values for _, values in biases]), logits)
            flat[index] = _keep_possible(biased, before)


class _SeenTokens:
    """The distinct tokens of one request, and how often each was output. Grows by doubling."""

    def __init__(self, request: NewRequestData) -> None:
        tokens = np.asarray(request.token_ids, dtype=np.int64)
        output = tokens[request.num_prompt_tokens :]
        distinct = np.unique(tokens)
        self.num_seen = len(distinct)
        self._token_ids = np.zeros(2 * self.num_seen + 64, dtype=np.int64)
        self._counts = np.zeros(2 * self.num_seen + 64, dtype=np.float32)
        self._token_ids[: self.num_seen] = distinct
        self._counts[: self.num_seen] = np.bincount(np.searchsorted(distinct, output), minlength=self.num_seen)
        self._index_of = {token_id: index for index, token_id in enumerate(distinct.tolist())}

    @property
    def token_ids(self) -> IntArray:
        return self._token_ids[: self.num_seen]

    @property
    def output_counts(self) -> FloatArray:
        return self._counts[: self.num_seen]

    def append(self, token_id: int) -> None:
        index = self._index_of.setdefault(token_id, self.num_seen)
        if index == self.num_seen:
            if index == len(self._token_ids):
                self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._token_ids[index] = token_id
            self.num_seen += 1
        self._counts[index] += 1.0


class Penalties:
    """Repetition (over prompt and output), frequency and presence (over output) penalties, as vLLM defines them."""

    def __init__(self) -> None:
        self._seen: dict[int, _SeenTokens] = {}
        self._repetition: dict[int, float] = {}
        self._frequency: dict[int, float] = {}
        self._presence: dict[int, float] = {}

    def add(self, row: int, request: NewRequestData) -> None:
        params = request.sampling_params
        if params.has_penalties:
            self._seen[row] = _SeenTokens(request)
            self._repetition[row] = params.repetition_penalty
            self._frequency[row] = params.frequency_penalty
            self._presence[row] = params.presence_penalty

    def remove(self, row: int) -> None:
        for state in (self._seen, self._repetition, self._frequency, self._presence):
            state.pop(row, None)

    def append(self, row: int, token_id: int) -> None:
        seen = self._seen.get(row)
        if seen is not None:
            seen.append(token_id)

    def is_used_by(self, row: int) -> bool:
        return row in self._seen

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        used = [index for index, row in enumerate(rows) if row in self._seen]
        if not used:
            return
        used_rows = [rows[each] for each in used]
        seen = [self._seen[row] for row in used_rows]
        lengths = [each.num_seen for each in seen]

        def per_token(value: dict[int, float]) -> torch.Tensor:
            column = np.array([value[row] for row in used_rows], dtype=np.float32)
            return _to_device(np.repeat(column, lengths), logits)

        counts = _to_device(np.concatenate([each.output_counts for each in seen]), logits)
        flat, index = _flat_index(logits, used, [each.token_ids for each in seen])
        before = values = flat[index]
        repetition = per_token(self._repetition)
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= per_token(self._frequency) * counts
        values -= per_token(self._presence) * (counts > 0)
        flat[index] = _keep_possible(values, before)


def _keep_possible(values: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Only a mask makes a token impossible: what a bias or a penalty drives out of float32's range is just unlikely."""
    limit = torch.finfo(values.dtype).max
    return torch.where(before.isneginf(), before, values.clamp(-limit, limit))


def _flat_index(
    logits: torch.Tensor, indexes: Sequence[int], token_ids: Sequence[IntArray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits as one dimension, and where in it row `indexes[i]` has the tokens `token_ids[i]`."""
    vocab_size = logits.shape[1]
    index = np.concatenate([row * vocab_size + ids for row, ids in zip(indexes, token_ids, strict=True)])
    return logits.view(-1), _to_device(index, logits)


def _to_device(array: npt.NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).to(like.device)
