"""Answering over HTTP: whole or as events, and nothing goes on after a client that leaves.

Knows what chat and completions share and neither's shapes: those are given as a writer, or as the work that ends in
the whole answer.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from quire_server.api.errors import CLIENT_CLOSED_REQUEST, build_error, json_response
from quire_server.api.openai.head import AnswerHead
from quire_server.api.openai.schemas.answers import PromptTokensDetails, Usage
from quire_server.api.openai.schemas.requests import GenerationFields
from quire_server.api.sse import DONE, ClientDisconnectedError, EventStream, encode_event, run_until_disconnect
from quire_server.config import ServerConfig
from quire_server.errors import QuireError
from quire_server.generation.fan_out import Generation
from quire_server.generation.request import GenerationRequest, Prompt
from quire_server.output_processor import CompletionDelta

Choice = TypeVar("Choice", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageOptions:
    """Where a stream says its usage."""

    is_at_end: bool
    is_in_every_chunk: bool

    @classmethod
    def of(cls, config: ServerConfig, request: GenerationFields) -> "UsageOptions":
        options = request.stream_options
        is_at_end = config.enable_force_include_usage or bool(options and options.include_usage)
        is_in_every_chunk = is_at_end and bool(options and options.continuous_usage_stats)
        return cls(is_at_end=is_at_end, is_in_every_chunk=is_in_every_chunk)


BuildChunk = Callable[[AnswerHead, list[Choice], Usage | UnsetType, str | UnsetType], msgspec.Struct]
"""Shapes one dialect's chunk from its head, choices, usage and fingerprint."""


class ChunkEncoder(Generic[Choice]):
    """Encodes a stream's chunks: what all of them repeat, around the choices of each."""

    def __init__(
        self, build_chunk: BuildChunk[Choice], head: AnswerHead, generation: Generation, usage: UsageOptions
    ) -> None:
        self._build_chunk = build_chunk
        self._head = head
        self._generation = generation
        self._usage = usage

    def encode(
        self, choices: list[Choice], *, is_last: bool = False, build_chunk: BuildChunk[Choice] | None = None
    ) -> bytes:
        """Encode one event; `is_last` where it ends a choice, `build_chunk` where its chunk is a special one."""
        head = self._head
        usage = build_usage(self._generation) if self._usage.is_in_every_chunk else UNSET
        fingerprint = head.system_fingerprint if is_last else UNSET
        return encode_event((build_chunk or self._build_chunk)(head, choices, usage, fingerprint))

    def encode_usage(self) -> bytes:
        """Encode the event that ends the stream; empty where it was not asked for."""
        if not self._usage.is_at_end:
            return b""
        head = self._head
        return encode_event(self._build_chunk(head, [], build_usage(self._generation), head.system_fingerprint))


class ChunkWriter(Protocol):
    """Writes one dialect's chunks."""

    encoder: ChunkEncoder[Any]

    def write(self, index: int, delta: CompletionDelta) -> bytes:
        """Return the events that a delta makes; empty where it adds nothing that is shown."""
        ...


def build_generation_request(
    request: GenerationFields, request_id: str, prompts: Sequence[Prompt]
) -> GenerationRequest:
    """Say to the engine's side what was asked for."""
    return GenerationRequest(
        request_id=request_id, prompts=prompts, priority=request.priority or 0, cache_salt=request.cache_salt
    )


def build_usage(generation: Generation) -> Usage:
    """Shape the token counts so far."""
    counts = generation.count_tokens()
    return Usage(
        prompt_tokens=counts.num_prompt_tokens,
        total_tokens=counts.num_prompt_tokens + counts.num_output_tokens,
        completion_tokens=counts.num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=counts.num_cached_tokens),
    )


def answer_stream(generation: Generation, writer: ChunkWriter) -> Response:
    """Answer with events as the deltas come."""
    return EventStream(_write_events(generation, writer), generation.aclose)


async def answer_whole(
    http_request: Request, generation: Generation, work: Coroutine[Any, Any, msgspec.Struct]
) -> Response:
    """Answer with what `work` returns, which reads the generation to its end."""
    try:
        answer = await run_until_disconnect(http_request.receive, work)
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await generation.aclose()
    return json_response(answer)


async def _write_events(generation: Generation, writer: ChunkWriter) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream, then [DONE]; an error after the start becomes an event."""
    try:
        async with contextlib.aclosing(generation.deltas()) as deltas:
            async for index, delta in deltas:
                if chunk := writer.write(index, delta):
                    yield chunk
        if last := writer.encoder.encode_usage():
            yield last
    except QuireError as error:
        yield encode_event(build_error(error))
    yield DONE
