"""One open request's outputs, between the task that reads the engine's messages and the one that answers the client.

Outputs that wait are merged into one per branch, so a slow client costs memory for its tokens and nothing else.

Invariants: each branch of the request (most have one) ends once, and nothing of it follows; the stream ends when its
last branch has, or at once with an output that ends the whole request, which is then the last to be read.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from quire_server.engine.output import RequestOutput
from quire_server.errors import QuireError


def merge_outputs(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Join two consecutive outputs of one branch of one request."""
    return RequestOutput(
        request_id=first.request_id,
        branch=first.branch,
        new_token_ids=first.new_token_ids + second.new_token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
        scheduled_time=first.scheduled_time if first.scheduled_time is not None else second.scheduled_time,
        error=second.error,
    )


class OutputStream:
    """Async iterator over one request's outputs; the last one of each branch carries `finish_reason`.

    Closing it (`aclose`, the end of `async with`, or cancellation while waiting) before its end calls
    `on_close`, once.
    """

    def __init__(self, request_id: str, on_close: Callable[[str], None], *, num_branches: int = 1) -> None:
        self.request_id = request_id
        self._on_close = on_close
        self._num_branches = num_branches
        self._ended_branches: set[int] = set()
        self._pending: dict[int, RequestOutput] = {}  # by branch, the first to be read first
        self._error: QuireError | None = None
        self._is_complete = False  # the last output is here, or an error took its place
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing more can come; what has come may still have to be read."""
        return self._is_complete

    def put(self, output: RequestOutput) -> None:
        """Add what a step brought."""
        if self._is_complete or (output.branch in self._ended_branches and not output.ends_request):
            return
        waiting = self._pending.get(output.branch)
        if output.finish_reason is not None:
            self._ended_branches.add(output.branch)
            self._is_complete = output.ends_request or len(self._ended_branches) == self._num_branches
            if self._is_complete:
                self._pending.pop(output.branch, None)  # the end is read after what other branches still have
        self._pending[output.branch] = output if waiting is None else merge_outputs(waiting, output)
        self._wake()

    def end_branch(self, branch: int) -> None:
        """Take no more of one branch: it was read to its end, or ended where text is made. With the last one, close."""
        self._ended_branches.add(branch)
        self._pending.pop(branch, None)
        is_over = self._is_complete or len(self._ended_branches) == self._num_branches
        if is_over and not self._pending and self._error is None:
            self.close()

    def fail(self, error: QuireError) -> None:
        """End the stream with an error, after the outputs that wait."""
        if self._is_complete:
            return
        self._error = error
        self._is_complete = True
        self._wake()

    def close(self) -> None:
        """End the stream for its reader; aborts the request if it still runs."""
        self._pending.clear()
        self._error = None
        self._is_closed = True
        if not self._is_complete:
            self._is_complete = True
            self._on_close(self.request_id)
        self._wake()

    async def aclose(self) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._pending:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._is_complete:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.close()
                raise
            finally:
                self._waiter = None
        return self._pending.pop(next(iter(self._pending)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
