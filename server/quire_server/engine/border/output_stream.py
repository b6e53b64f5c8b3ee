"""One open request's outputs, between the task that reads the engine's messages and the one that answers the client.

Outputs that wait are merged into one per branch, so a slow client costs memory for its tokens and nothing else.

A branch may be ended by the engine, or by its reader, who met a stop string: the engine then still makes it. These are
kept apart, as the engine has to be told to stop when all branches have ended and one of them not there.

Invariants: each branch of the request (most have one) ends once, and nothing of it follows; the stream ends when its
last branch has, or at once with an output that ends the whole request, which is then the last to be read. `on_close` is
called once, unless the engine ended everything itself.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from quire_server.engine.output import EngineCoreOutput
from quire_server.shared.errors import QuireError


def merge_outputs(first: EngineCoreOutput, second: EngineCoreOutput) -> EngineCoreOutput:
    """Join two consecutive outputs of one branch of one request."""
    return EngineCoreOutput(
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

    Ending it while the engine still makes some of it calls `on_close`, once: by `aclose`, the end of `async with`,
    cancellation while waiting, or `end_branch`.
    """

    def __init__(self, request_id: str, on_close: Callable[[str], None], *, num_branches: int = 1) -> None:
        self.request_id = request_id
        self._on_close = on_close
        self._num_branches = num_branches
        self._ended_by_engine: set[int] = set()  # branches
        self._ended_by_reader: set[int] = set()
        self._is_over = False  # the engine ended the request as a whole
        self._pending: dict[int, EngineCoreOutput] = {}  # by branch, the first to be read first
        self._end: EngineCoreOutput | None = None  # of the whole request, read after all that is pending
        self._error: QuireError | None = None
        self._is_complete = False  # the last output is here, or an error took its place
        self._waiter: asyncio.Future[None] | None = None

    @property
    def has_ended_in_engine(self) -> bool:
        """Whether the engine has said the last of it. Told to a stream that was closed, too."""
        return self._is_over or len(self._ended_by_engine) == self._num_branches

    def put(self, output: EngineCoreOutput) -> None:
        """Add what a step brought."""
        if output.ends_request:
            self._is_over = True
            self.end(output)
            return
        branch = output.branch
        if branch in self._ended_by_engine:
            return
        if output.finish_reason is not None:
            self._ended_by_engine.add(branch)
        if self._is_complete:
            return
        is_last = output.finish_reason is not None and self._have_all_branches_ended()
        if branch not in self._ended_by_reader:
            # the last end is read after what other branches still have
            waiting = self._pending.pop(branch, None) if is_last else self._pending.get(branch)
            self._pending[branch] = output if waiting is None else merge_outputs(waiting, output)
        if is_last:
            self._complete()
        self._wake()

    def end(self, output: EngineCoreOutput) -> None:
        """End all branches that have not ended yet, with one output for all, after what waits."""
        if self._is_complete:
            return
        waiting = self._pending.get(output.branch)
        if waiting is not None and waiting.finish_reason is None:
            output = merge_outputs(self._pending.pop(output.branch), output)
        self._end = output
        self._is_complete = True
        self._wake()

    def end_branch(self, branch: int) -> None:
        """Take no more of one branch: it was read to its end, or ended where text is made. With the last one, close."""
        self._ended_by_reader.add(branch)
        self._pending.pop(branch, None)
        if self._have_all_branches_ended():
            self._end = None  # there is nothing left that it could end
            if not self._is_complete:
                self._complete()
        elif self._end is not None and self._end.branch == branch:
            self._end = msgspec.structs.replace(self._end, new_token_ids=[], logprobs=[])
        self._wake()

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
        self._end = self._error = None
        if not self._is_complete:
            self._complete()
        self._wake()

    async def aclose(self) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EngineCoreOutput:
        while not self._pending:
            if self._end is not None:
                end, self._end = self._end, None
                return end
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

    def _have_all_branches_ended(self) -> bool:
        return len(self._ended_by_engine | self._ended_by_reader) == self._num_branches

    def _complete(self) -> None:
        self._is_complete = True
        if not self.has_ended_in_engine:
            self._on_close(self.request_id)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
