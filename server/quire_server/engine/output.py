"""What crosses the seams of a step: scheduler → runner, runner → scheduler, engine → API process.

Plain data, torch-free, encodable with msgpack, so that a step can be broadcast to several workers later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from quire_server.engine.request import FinishReason
from quire_server.errors import CodedError, QuireError, encode_error
from quire_server.sampling_params import SamplingParams


class BlockCopy(NamedTuple):
    """Copy one block's KV, in every layer, before the step's model runs. Both ends stay pinned until it has run."""

    src: int
    dst: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequestData:
    """A request that enters the running batch: new, or resumed after preemption (which is an end and a new start)."""

    request_id: str
    token_ids: Sequence[int]
    """Every token known so far: the prompt, and after a preemption the output too."""
    num_prompt_tokens: int
    sampling_params: SamplingParams
    eos_token_ids: tuple[int, ...]
    block_ids: Sequence[int]
    num_computed_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequestData:
    """What changed for a request that the runner already knows."""

    request_id: str
    new_block_ids: Sequence[int]
    """Blocks to append to its block table."""
    num_computed_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput:
    """One step's work. Order of execution: removals, block movement, additions, the model, sampling.

    A request may read a block that another request of the same step fills (two prompts with a common prefix that come
    together): in every layer, all keys and values are written before any are read.
    """

    new_requests: Sequence[NewRequestData] = ()
    running_requests: Sequence[RunningRequestData] = ()
    num_scheduled_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens to compute per request: the ones right after its `num_computed_tokens`."""
    total_num_scheduled_tokens: int = 0
    removed_request_ids: Sequence[str] = ()
    """Requests whose runner state goes: finished, aborted or preempted since the last step."""
    block_copies: Sequence[BlockCopy] = ()
    swap_out: Sequence[BlockCopy] = ()
    """Device block → host block."""
    swap_in: Sequence[BlockCopy] = ()
    """Host block → device block."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: list[tuple[int, float]] = []
    """The most likely tokens, best first; as many as were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOutput:
    """What one step made. A request whose prompt is not finished yet has no entry in `sampled_token_ids`."""

    sampled_token_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)
    logprobs: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    """One per sampled token, for requests that asked."""
    prompt_logprobs: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    """For the prompt positions computed in this step (position p says how likely token p + 1 was)."""


class Runner(Protocol):
    """What executes a step: the model runner in this process, or (later) an executor over several."""

    def execute(self, scheduler_output: SchedulerOutput) -> RunnerOutput: ...


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step added to one branch of one request; the last one of a branch carries `finish_reason`.

    The request ends with its last branch, or at once with FinishReason.ABORT or ERROR, whichever branch they name.
    """

    request_id: str
    branch: int = 0
    """Which of the request's answers this belongs to: 0 to `num_branches` - 1. What is the prompt's comes with 0."""
    new_token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    scheduled_time: float | None = None
    """Unix time of the first step that included the request."""
    error: CodedError | None = None
    """With FinishReason.ERROR: what to tell the client."""

    @classmethod
    def failed(cls, request_id: str, error: QuireError) -> "RequestOutput":
        """Build the end of a request that was refused, or went wrong."""
        return cls(request_id=request_id, finish_reason=FinishReason.ERROR, error=encode_error(error))

    @property
    def ends_request(self) -> bool:
        """Whether it ends every branch, not its own alone."""
        return self.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and counters of the engine; counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of allocatable blocks that are held, 0 to 1."""
    prefix_cache_queries: int = 0
    """Tokens looked up."""
    prefix_cache_hits: int = 0
    """Tokens found."""
    num_preemptions: int = 0
    num_steps: int = 0
    step_num_tokens: int = 0
    """Tokens scheduled in the last step."""
