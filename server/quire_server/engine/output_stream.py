"""One open request's outputs, between the task that reads the engine's messages and the one that answers the client.

Outputs that wait are merged into one, so a slow client costs memory for its tokens and nothing else.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from quire_server.engine.output import RequestOutput
from quire_server.errors import QuireError


def merge_outputs(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Join two consecutive outputs of one request."""
    return RequestOutput(
        request_id=first.request_id,
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
    """Async iterator over one request's outputs; the last one carries `finish_reason`.

    Closing it (`aclose`, the end of `async with`, or cancellation while waiting) before its end calls
    `on_close`, once.
    """

    def __init__(self, request_id: str, on_close: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._on_close = on_close
        self._pending: RequestOutput | None = None
        self._error: QuireError | None = None
        self._is_complete = False  # the last output is here, or an error took its place
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        """Add what a step brought."""
        if self._is_complete:
            return
        self._pending = output if self._pending is None else merge_outputs(self._pending, output)
        self._is_complete = output.finish_reason is not None
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
        self._pending = self._error = None
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
        while self._pending is None:
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
        output, self._pending = self._pending, None
        return output

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
