"""A step while the scheduler puts it together. Owns the step's budget and lists, and decides nothing."""

from collections.abc import Sequence

from quire_server.engine.request import Request
from quire_server.engine.step import BlockCopy, NewRequestData, ScheduledRequest, SchedulerOutput


class StepBuilder:
    """Collects requests and their tokens."""

    def __init__(self, token_budget: int) -> None:
        self.token_budget = token_budget
        """Tokens that are left to give."""
        self._scheduled: list[ScheduledRequest] = []
        self._new_requests: list[NewRequestData] = []

    def add(self, share: ScheduledRequest) -> None:
        """Add a request's share."""
        self._scheduled.append(share)
        self.token_budget -= share.num_tokens

    def introduce(self, request: Request) -> None:
        """Describe a request that the runner does not know."""
        self._new_requests.append(
            NewRequestData(
                request_id=request.request_id,
                token_ids=list(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                sampling_params=request.sampling_params,
                eos_token_ids=tuple(sorted(request.eos_token_ids)),
            )
        )

    def build(self, removed_request_ids: Sequence[str], block_copies: Sequence[BlockCopy]) -> SchedulerOutput:
        return SchedulerOutput(
            scheduled=self._scheduled,
            new_requests=self._new_requests,
            removed_request_ids=removed_request_ids,
            block_copies=block_copies,
        )
