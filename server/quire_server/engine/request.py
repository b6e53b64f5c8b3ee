"""A request as the engine sees it: token ids in, token ids out. No text, no torch, no clock."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from quire_server.engine.block_pool import BlockHash
from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.pooling_params import PoolingParams
from quire_server.shared.sampling_params import SamplingParams

_MAX_PRIORITY = 2**31


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it crosses from the API process to the engine. What can be said of it without a model is true.

    Raises:
        InvalidRequestError: it could run on no model; `param` names the field. So does decoding one.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams | PoolingParams
    """Of sampling, `max_tokens` is filled in (never None), and `stop` is not the engine's business."""
    eos_token_ids: tuple[int, ...] = ()
    arrival_time: float = 0.0
    """Unix time in seconds at which the API process took the request."""
    priority: int = 0
    """Lower runs first, under the priority policy."""
    cache_salt: str | None = None
    """Only requests with an equal salt share cached prefixes."""
    num_branches: int = 1
    """Answers that the engine makes of it: branches 0 to num_branches - 1, each of which ends once."""

    def __post_init__(self) -> None:
        _require(bool(self.request_id), "request_id", "The request id is empty.")
        _require(bool(self.prompt_token_ids), "prompt", "The prompt is empty: it must have at least one token.")
        _require(_are_token_ids(self.prompt_token_ids), "prompt", "The prompt has something that is no token id.")
        _require(math.isfinite(self.arrival_time), "arrival_time", "The arrival time is not a finite number.")
        _require(-_MAX_PRIORITY <= self.priority < _MAX_PRIORITY, "priority", "The priority does not fit 32 bits.")
        _require(self.num_branches >= 1, "n", "The number of branches must be at least 1.")
        if isinstance(self.params, SamplingParams):
            _require(self.params.max_tokens is not None, "max_tokens", "max_tokens is not filled in.")

    @property
    def sampling_params(self) -> SamplingParams:
        """The parameters of a request that generates. Must not be asked of one that pools."""
        assert isinstance(self.params, SamplingParams), self.request_id
        return self.params


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message, param)


def _are_token_ids(values: Sequence[int]) -> bool:
    """Whether these are integers that some model may have: one pass in C, as prompts are long."""
    try:
        array("I", values)
    except (TypeError, OverflowError):
        return False
    return True


class RequestStatus(StrEnum):
    """Where a request is; BLOCKED: it cannot run yet, whatever room there is (see `Request.blockers`)."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    BLOCKED = "blocked"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended; the values are what the API shows."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Scheduler state of one request. Owned and mutated by the scheduler alone."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int]
    arrival_time: float
    priority: int
    cache_salt: str | None
    max_tokens: int
    token_ids: list[int]
    """Prompt followed by output; append-only."""
    status: RequestStatus = RequestStatus.WAITING
    sequence_number: int = 0
    """Counts the requests in the order in which the scheduler took them."""
    epoch: int = 0
    """Its present stay in the running batch; a step of another one says nothing about it any more."""
    blockers: set[str] = field(default_factory=set)
    """What it waits for before it may be admitted at all, such as an adapter that loads."""
    num_computed_tokens: int = 0
    """Tokens whose KV is in the cache, or will be after the steps in flight; drafts that they try are counted in."""
    num_pending_tokens: int = 0
    """Most tokens that the steps in flight will add to `token_ids`."""
    has_drafts_in_flight: bool = False
    """A step in flight tries drafts, so that nobody knows where the next one would begin."""
    draft_token_ids: Sequence[int] = ()
    """Guesses for the next step to try."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request was first scheduled."""
    num_preemptions: int = 0
    scheduled_time: float | None = None
    """Unix time of the first step that included it."""
    num_sent_prompt_logprobs: int = 0
    """Prompt positions whose log-probabilities have been sent; a preempted request computes them again."""
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Of its leading full blocks, each computed once; kept by the KV cache manager."""

    @classmethod
    def from_engine_request(cls, request: EngineRequest) -> "Request":
        max_tokens = request.sampling_params.max_tokens
        assert max_tokens is not None, request.request_id  # checked where it was built
        return cls(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=request.sampling_params,
            eos_token_ids=frozenset(request.eos_token_ids),
            arrival_time=request.arrival_time,
            priority=request.priority,
            cache_salt=request.cache_salt,
            max_tokens=max_tokens,
            token_ids=list(request.prompt_token_ids),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED
