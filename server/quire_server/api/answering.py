"""Answering over HTTP: whole or as events, and nothing goes on after a client that leaves.

Knows no dialect: what is said is made by a writer, or by the work that ends in the whole answer.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, Final, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire_server.api.bodies.body import declared_bytes
from quire_server.api.errors import CLIENT_CLOSED_REQUEST, json_response, long_json_response
from quire_server.api.sse import ClientDisconnectedError, EventStream, run_until_disconnect
from quire_server.frontend.output_processor import CompletionDelta
from quire_server.frontend.text_lanes import LONG_CHARS
from quire_server.generation.fan_out import Generation
from quire_server.shared.errors import QuireError

T = TypeVar("T")

LONG_ANSWER_TOKENS: Final = 500
"""From here on, prompt included, an answer is shaped in a thread."""


class EventWriter(Protocol):
    """Writes one answer as one dialect's events."""

    def write(self, index: int, delta: CompletionDelta) -> bytes:
        """Return the events that a choice's delta makes; empty where it adds nothing that is shown."""
        ...

    def write_end(self, error: QuireError | None) -> Iterable[bytes]:
        """Return the events that end the stream: after an error, or after every choice has come to its end."""
        ...


def answer_stream(generation: Generation, writer: EventWriter) -> Response:
    """Answer with events as the deltas come."""
    return EventStream(_write_events(generation, writer), generation.aclose)


async def prepare(http_request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await what comes before an answer is begun. The work for a long body ends when its client leaves.

    Raises:
        ClientDisconnectedError: the client left first.
    """
    num_bytes = declared_bytes(http_request)
    if num_bytes is not None and num_bytes < LONG_CHARS:
        return await work  # done before anybody could leave
    return await run_until_disconnect(http_request.receive, work)


async def answer_whole(
    http_request: Request, generation: Generation, work: Coroutine[Any, Any, Callable[[], msgspec.Struct]]
) -> Response:
    """Answer with what `work` returns, which reads the generation to its end, and leaves only the shaping to be done.

    Shaping and encoding take microseconds for each token (twenty times more with log-probabilities), so long answers
    are made in a thread.
    """
    try:
        build = await run_until_disconnect(http_request.receive, work)
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await generation.aclose()
    counts = generation.count_tokens()
    if counts.num_prompt_tokens + counts.num_output_tokens < LONG_ANSWER_TOKENS:
        return json_response(build())
    return await asyncio.to_thread(lambda: long_json_response(build()))


async def _write_events(generation: Generation, writer: EventWriter) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream; after its start, an error can only be told as one of them."""
    error: QuireError | None = None
    try:
        async with contextlib.aclosing(generation.deltas()) as deltas:
            async for index, delta in deltas:
                if events := writer.write(index, delta):
                    yield events
    except QuireError as raised:
        error = raised
    for event in writer.write_end(error):
        yield event
