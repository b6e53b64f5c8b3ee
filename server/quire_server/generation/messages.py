"""From deltas of text to parts of a message: the one place between the engine's deltas and those who write answers.

A model writes everything into one text: what it says, what it thinks, the calls it makes. A parser, one for each
choice, takes that apart as it comes. Streamed and whole answers are made of the same deltas, and so cannot differ.
Knows no dialect: how a message is written belongs to the endpoints. What is made for each event is a msgspec struct:
making one costs a tenth of a microsecond, a frozen dataclass five times that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec

from quire_server.frontend.output_processor import CompletionDelta
from quire_server.generation.fan_out import Answer, Generation
from quire_server.generation.request import GenerationRequest


class MessageFinishReason(StrEnum):
    """Why a message ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TOOL_CALLS = "tool_calls"  # what only a parser can see; FinishReason.ERROR has no place here, it is raised


class ContentFragment(msgspec.Struct, frozen=True):
    """A piece of what is said."""

    text: str


MessageFragment = ContentFragment
"""What a message is made of, in order; a union, once models think aloud or call tools."""


class MessageDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What was added to one message; the last one carries `finish_reason`."""

    completion: CompletionDelta
    """What it was made from: the token ids and log-probabilities, which fragments may lag behind."""
    fragments: Sequence[MessageFragment]
    finish_reason: MessageFinishReason | None


class MessageParser(Protocol):
    """Makes one message of its choice's deltas.

    Must not depend on how the text is cut into deltas. May hold text back as long as its meaning is open, but nothing
    beyond the last delta, which is the one with a finish reason.
    """

    def feed(self, delta: CompletionDelta) -> MessageDelta:
        """Return what this delta adds. Called once for each, in order, with none after the last."""
        ...


class PlainTextParser:
    """Everything is content."""

    def feed(self, delta: CompletionDelta) -> MessageDelta:
        return MessageDelta(
            completion=delta,
            fragments=(ContentFragment(delta.text),) if delta.text else (),
            finish_reason=None if delta.finish_reason is None else MessageFinishReason(delta.finish_reason.value),
        )


def build_parsers(request: GenerationRequest) -> list[MessageParser]:
    """Choose how the model's text is read: one parser for each choice. The only place where that is decided."""
    return [PlainTextParser() for _ in request.choice_to_prompt]


@dataclass(slots=True, kw_only=True)
class Message:
    """One whole message, once every delta was added."""

    answer: Answer = field(default_factory=Answer)
    """What it was made from."""
    finish_reason: MessageFinishReason | None = None
    _contents: list[str] = field(default_factory=list)

    @property
    def content(self) -> str:
        return "".join(self._contents)

    def add(self, delta: MessageDelta) -> None:
        self.answer.add(delta.completion)
        for fragment in delta.fragments:
            self._contents.append(fragment.text)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason


async def collect_messages(generation: Generation, parsers: Sequence[MessageParser]) -> list[Message]:
    """Read every message to its end."""
    messages = [Message() for _ in parsers]
    async for index, delta in generation.deltas():
        messages[index].add(parsers[index].feed(delta))
    return messages
