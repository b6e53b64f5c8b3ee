"""What the streams of chat and completions share: what every chunk repeats, where usage stands, and how they end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from quire_server.api.errors import build_error
from quire_server.api.openai.head import AnswerHead
from quire_server.api.openai.schemas.answers import PromptTokensDetails, Usage
from quire_server.api.openai.schemas.requests import GenerationFields
from quire_server.api.sse import encode_event
from quire_server.frontend.output_processor import CompletionDelta
from quire_server.generation.fan_out import Generation
from quire_server.generation.request import TokenCounts
from quire_server.shared.config import ServerConfig
from quire_server.shared.errors import QuireError

DONE: Final = b"data: [DONE]\n\n"

Choice = TypeVar("Choice", bound=msgspec.Struct)
BuildChunk = Callable[[AnswerHead, list[Choice], Usage | UnsetType, str | UnsetType], msgspec.Struct]
"""Shapes one endpoint's chunk from its head, choices, usage and fingerprint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageOptions:
    """Where a stream says its usage."""

    is_at_end: bool
    is_in_every_chunk: bool

    @classmethod
    def of(cls, config: ServerConfig, request: GenerationFields) -> "UsageOptions":
        options = request.stream_options
        if config.enable_force_include_usage:
            return cls(is_at_end=True, is_in_every_chunk=True)
        is_at_end = bool(options and options.include_usage)
        is_in_every_chunk = is_at_end and bool(options and options.continuous_usage_stats)
        return cls(is_at_end=is_at_end, is_in_every_chunk=is_in_every_chunk)


class ChunkWriter(ABC, Generic[Choice]):
    """Writes a stream of chunks, each of which says what `AnswerHead` does. A subclass writes the choices."""

    def __init__(
        self, build_chunk: BuildChunk[Choice], head: AnswerHead, generation: Generation, usage: UsageOptions
    ) -> None:
        self._build_chunk = build_chunk
        self._head = head
        self._generation = generation
        self._usage = usage

    @abstractmethod
    def write(self, index: int, delta: CompletionDelta) -> bytes:
        """Encode what a delta adds; empty where it adds nothing that is shown."""

    def write_end(self, error: QuireError | None) -> Sequence[bytes]:
        """Encode the error, or the usage where it was asked for; then [DONE]."""
        if error is not None:
            return encode_event(build_error(error)), DONE
        if not self._usage.is_at_end:
            return (DONE,)
        head = self._head
        last = self._build_chunk(head, [], build_usage(self._generation.count_tokens()), head.system_fingerprint)
        return encode_event(last), DONE

    def _encode(
        self,
        index: int,
        choice: Choice,
        *,
        has_output: bool = True,
        is_last: bool = False,
        build_chunk: BuildChunk[Choice] | None = None,
    ) -> bytes:
        """Encode one event of the choice with this index.

        Args:
            has_output: False for an event before the choice's first token, though that may be there already.
            is_last: it ends the choice.
            build_chunk: what makes the chunk, where it is a special one.
        """
        head = self._head
        usage: Usage | UnsetType = UNSET
        if self._usage.is_in_every_chunk:
            usage = build_usage(self._generation.count_tokens_of(index, has_output=has_output))
        fingerprint = head.system_fingerprint if is_last else UNSET
        return encode_event((build_chunk or self._build_chunk)(head, [choice], usage, fingerprint))


def build_usage(counts: TokenCounts) -> Usage:
    """Shape the token counts so far."""
    return Usage(
        prompt_tokens=counts.num_prompt_tokens,
        total_tokens=counts.num_prompt_tokens + counts.num_output_tokens,
        completion_tokens=counts.num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=counts.num_cached_tokens),
    )
