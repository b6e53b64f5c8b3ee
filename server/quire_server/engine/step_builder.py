"""A step while the scheduler puts it together. Owns the step's budget and lists, and decides nothing."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from quire_server.engine.output import BlockCopy, NewRequestData, RunningRequestData, SchedulerOutput
from quire_server.engine.request import Request


class _RunningShare(NamedTuple):
    request: Request
    num_tokens: int
    new_block_ids: Sequence[int]


class StepBuilder:
    """Collects requests and their tokens. Running requests can be cancelled until `commit_running`."""

    def __init__(self, token_budget: int) -> None:
        self.token_budget = token_budget
        """Tokens that are left to give."""
        self.has_preempted = False
        self._running: dict[str, _RunningShare] = {}
        self._running_requests: list[RunningRequestData] = []
        self._new_requests: list[NewRequestData] = []
        self._num_scheduled_tokens: dict[str, int] = {}

    def add_running(self, request: Request, num_tokens: int, new_block_ids: Sequence[int]) -> None:
        self._running[request.request_id] = _RunningShare(request, num_tokens, new_block_ids)
        self.token_budget -= num_tokens

    def cancel_running(self, request: Request) -> None:
        """Take back what a running request was given in this step, if anything."""
        share = self._running.pop(request.request_id, None)
        if share is not None:
            self.token_budget += share.num_tokens

    def commit_running(self) -> Iterator[tuple[Request, int]]:
        """Fix the running requests' part; yields each with its tokens, for the caller to advance it."""
        for request, num_tokens, new_block_ids in self._running.values():
            request_id = request.request_id
            self._running_requests.append(
                RunningRequestData(
                    request_id=request_id,
                    new_block_ids=new_block_ids,
                    num_computed_tokens=request.num_computed_tokens,
                )
            )
            self._num_scheduled_tokens[request_id] = num_tokens
            yield request, num_tokens

    def add_new(self, request: Request, num_tokens: int, block_ids: Sequence[int]) -> None:
        """Add a request that the runner does not know; called before it is advanced."""
        self._new_requests.append(
            NewRequestData(
                request_id=request.request_id,
                token_ids=list(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                sampling_params=request.sampling_params,
                eos_token_ids=tuple(sorted(request.eos_token_ids)),
                block_ids=block_ids,
                num_computed_tokens=request.num_computed_tokens,
            )
        )
        self._num_scheduled_tokens[request.request_id] = num_tokens
        self.token_budget -= num_tokens

    def build(self, removed_request_ids: Sequence[str], block_copies: Sequence[BlockCopy]) -> SchedulerOutput:
        return SchedulerOutput(
            new_requests=self._new_requests,
            running_requests=self._running_requests,
            num_scheduled_tokens=self._num_scheduled_tokens,
            total_num_scheduled_tokens=sum(self._num_scheduled_tokens.values()),
            removed_request_ids=removed_request_ids,
            block_copies=block_copies,
        )
