"""One token per row from a step's logits, for a batch in which every request may ask for something else.

Order: raw log-probabilities are taken first; then allowed tokens, minimum length, bias, penalties; then temperature,
min-p, top-k and top-p (`quire_kernels.sample_tokens`).

Randomness is stateless: the uniform behind a request's n-th output token is a hash of (the request's seed, n), so an
answer depends neither on the batch around it nor on preemption. A request without a seed gets one made of the engine's
seed and its request id: another request, another seed; the same ids under the same --seed, the same answers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quire_kernels import sample_tokens
from quire_server.engine.output import TokenLogprobs
from quire_server.engine.step import NewRequestData
from quire_server.runner.input_batch import IntArray
from quire_server.runner.logits_processors import AllowedTokens, LogitBias, LogitsProcessor, MinTokens, Penalties
from quire_server.runner.logprobs import build_token_logprobs

_UINT64_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_NO_LOGPROBS = -1

UInt64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """One token per row, in the order of the rows given."""

    token_ids: IntArray  # [num_rows]
    logprobs: dict[int, TokenLogprobs]
    """By index into the rows, for those whose request asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """Parameters of one step's rows."""

    temperature: torch.Tensor  # [num_rows] float64
    top_k: torch.Tensor  # [num_rows] int64
    top_p: torch.Tensor  # [num_rows] float64
    min_p: torch.Tensor  # [num_rows] float64
    seeds: UInt64Array | None  # [num_rows]; None: all rows are greedy
    zeros: torch.Tensor  # [num_rows] float64
    wanted: torch.Tensor  # [num_wanted] int64, indexes of the rows that want log-probabilities
    num_top: list[int]  # [num_wanted] alternatives to list for each


class Sampler:
    """Sampling parameters of all rows as columns, and the processors of the rows that need them."""

    def __init__(self, *, max_num_seqs: int, seed: int) -> None:
        self._seed = seed
        self._temperature = np.zeros(max_num_seqs, dtype=np.float64)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._top_p = np.ones(max_num_seqs, dtype=np.float64)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float64)
        self._seeds = np.zeros(max_num_seqs, dtype=np.uint64)
        self._is_random = np.zeros(max_num_seqs, dtype=np.bool_)
        self._num_logprobs = np.full(max_num_seqs, _NO_LOGPROBS, dtype=np.int64)
        self._processors: tuple[LogitsProcessor, ...] = (AllowedTokens(), MinTokens(), LogitBias(), Penalties())
        self._processed_rows: set[int] = set()
        self._columns_of: tuple[bytes, _Columns] | None = None  # of the last step's rows

    def add(self, row: int, request: NewRequestData) -> None:
        """Take over a request's parameters."""
        self._columns_of = None
        params = request.sampling_params
        self._temperature[row] = params.temperature
        self._top_k[row] = max(params.top_k, 0)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._is_random[row] = not params.is_greedy
        self._num_logprobs[row] = _NO_LOGPROBS if params.logprobs is None else params.logprobs
        seed = derive_seed(self._seed, request.request_id) if params.seed is None else params.seed
        self._seeds[row] = seed & _UINT64_MASK
        for processor in self._processors:
            processor.add(row, request)
        if any(processor.is_used_by(row) for processor in self._processors):
            self._processed_rows.add(row)

    def remove(self, row: int) -> None:
        """Forget a row."""
        if row in self._processed_rows:
            self._processed_rows.remove(row)
            for processor in self._processors:
                processor.remove(row)

    def sample(
        self,
        logits: torch.Tensor,  # [num_rows, vocab_size] float32; overwritten
        rows: IntArray,  # [num_rows]
        output_positions: IntArray,  # [num_rows] output tokens that each request already has
    ) -> SampledTokens:
        """Sample one token for each of the rows, and remember it where a processor depends on it."""
        columns = self._gather_columns(rows, logits.device)
        raw_logits = logits[columns.wanted] if columns.num_top else None  # a copy
        is_processed = bool(self._processed_rows) and not self._processed_rows.isdisjoint(rows.tolist())
        if is_processed:
            self._process(logits, rows.tolist())
        token_ids = _choose(logits, columns, output_positions)
        sampled = token_ids.cpu().numpy()
        if is_processed:
            self._append(rows.tolist(), sampled.tolist())
        logprobs: dict[int, TokenLogprobs] = {}
        if raw_logits is not None:
            scored = build_token_logprobs(raw_logits, token_ids[columns.wanted], columns.num_top)
            logprobs = dict(zip(columns.wanted.tolist(), scored, strict=True))
        return SampledTokens(token_ids=sampled, logprobs=logprobs)

    def _gather_columns(self, rows: IntArray, device: torch.device) -> _Columns:
        """The rows' parameters, gathered anew only when the batch has changed."""
        key = rows.tobytes()
        if self._columns_of is None or self._columns_of[0] != key:

            def column(values: npt.NDArray[np.generic]) -> torch.Tensor:
                return torch.from_numpy(values[rows]).to(device)

            wanted = np.flatnonzero(self._num_logprobs[rows] >= 0)
            columns = _Columns(
                temperature=column(self._temperature),
                top_k=column(self._top_k),
                top_p=column(self._top_p),
                min_p=column(self._min_p),
                seeds=self._seeds[rows] if self._is_random[rows].any() else None,
                zeros=torch.zeros(len(rows), dtype=torch.float64, device=device),
                wanted=torch.from_numpy(wanted).to(device),
                num_top=self._num_logprobs[rows[wanted]].tolist(),
            )
            self._columns_of = (key, columns)
        return self._columns_of[1]

    def _process(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        for processor in self._processors:
            processor.apply(logits, rows)

    def _append(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        for row, token_id in zip(rows, token_ids, strict=True):
            if row in self._processed_rows:
                for processor in self._processors:
                    processor.append(row, token_id)


def _choose(logits: torch.Tensor, columns: _Columns, output_positions: IntArray) -> torch.Tensor:
    uniform = columns.zeros
    if columns.seeds is not None:
        drawn = uniforms(columns.seeds, output_positions.astype(np.uint64))
        uniform = torch.from_numpy(drawn).to(logits.device)
    return sample_tokens(logits, columns.temperature, columns.top_k, columns.top_p, columns.min_p, uniform)


def derive_seed(engine_seed: int, request_id: str) -> int:
    """The seed of a request that named none: the same for the same engine seed and request id, and for no other."""
    digest = hashlib.blake2b(f"{engine_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(seeds: UInt64Array, positions: UInt64Array) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1) as a hash of (seed, position): SplitMix64 (Steele, Lea, Flood 2014), from a mixed seed."""
    bits = _mix(_mix(seeds) + (positions + np.uint64(1)) * _GOLDEN_GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: UInt64Array) -> UInt64Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
