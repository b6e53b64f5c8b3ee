"""What crosses the seams of a step: scheduler → runner, and runner → scheduler.

Plain data, torch-free, so that a step can be broadcast to several workers. Several steps may be in flight: each carries
all that its end needs (`ScheduledRequest`), so that nobody looks at a request's live state to understand an older step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from quire_server.engine.output import TokenLogprobs
from quire_server.shared.sampling_params import SamplingParams


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledRequest:
    """One request's share of a step: compute the tokens at `first_position` and after, and sample what follows them."""

    request_id: str
    epoch: int
    """Which stay in the running batch this is, of all requests that ever were. An id may come back, after a preemption
    or for another request; what an older step made for it is told apart by this."""
    first_position: int
    """Tokens whose KV is there before the step."""
    num_tokens: int
    """Tokens to compute, drafts included. One that an earlier step in flight samples is known to the runner alone."""
    num_samples: int = 0
    """Most tokens that come of it: 0 while known tokens remain, else one, and one more for each draft."""
    draft_token_ids: Sequence[int] = ()
    """Guesses for the tokens after the known ones. A sample that differs from its draft makes the later ones void."""
    new_block_ids: Sequence[int] = ()
    """Blocks to append to its block table; for a new request the whole table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput:
    """One step's work. Order of execution: removals, block movement, additions, the model, sampling.

    A request may read a block that another request of the same step fills (two prompts with a common prefix that come
    together): in every layer, all keys and values are written before any are read.
    """

    scheduled: Sequence[ScheduledRequest] = ()
    """At most one share per request."""
    new_requests: Sequence[NewRequestData] = ()
    """Those of `scheduled` that the runner does not know."""
    removed_request_ids: Sequence[str] = ()
    """Requests whose runner state goes: finished, aborted or preempted since the last step."""
    block_copies: Sequence[BlockCopy] = ()
    swap_out: Sequence[BlockCopy] = ()
    """Device block → host block."""
    swap_in: Sequence[BlockCopy] = ()
    """Host block → device block."""

    @property
    def num_scheduled_tokens(self) -> dict[str, int]:
        """Tokens to compute per request."""
        return {each.request_id: each.num_tokens for each in self.scheduled}

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(each.num_tokens for each in self.scheduled)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it for a runner to do."""
        return not (self.scheduled or self.removed_request_ids or self.block_copies or self.swap_out or self.swap_in)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOutput:
    """What one step made. A request whose known tokens are not all computed has no entry in `sampled_token_ids`."""

    sampled_token_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """At most `num_samples`: the drafts that were right, and one token after them."""
    logprobs: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    """One per sampled token, for requests that asked."""
    prompt_logprobs: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    """For the prompt positions computed in this step (position p says how likely token p + 1 was)."""
    draft_token_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Guesses for the tokens after the sampled ones, for a later step to try."""


class StepHandle(Protocol):
    """A step that was handed to a runner."""

    def result(self) -> RunnerOutput:
        """Wait for the step's end. Raises whatever the step raised."""
        ...


class CompletedStep:
    """The handle of a runner that works while `submit` is called, as on a CPU."""

    __slots__ = ("_output",)

    def __init__(self, output: RunnerOutput) -> None:
        self._output = output

    def result(self) -> RunnerOutput:
        return self._output


class Runner(Protocol):
    """What executes steps: the model runner of one device, or an executor over several.

    Steps run in the order in which they are submitted, each as if those before it had ended: a token that an earlier
    one samples is there when a later one computes it.
    """

    @property
    def is_asynchronous(self) -> bool:
        """Whether `submit` returns before the step is done."""
        ...

    def submit(self, scheduler_output: SchedulerOutput) -> StepHandle: ...
