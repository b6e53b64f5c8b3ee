"""What leaves the engine: what a step added to each request, and how the engine is doing.

Plain data, torch-free, encodable with msgpack. What a step is made of, between scheduler and runner, is in `step`.
"""

import msgspec

from quire_server.engine.request import FinishReason
from quire_server.shared.errors import CodedError, QuireError, encode_error


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: list[tuple[int, float]] = []
    """The most likely tokens, best first; as many as were asked for."""


class EngineCoreOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
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
    def failed(cls, request_id: str, error: QuireError) -> "EngineCoreOutput":
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
