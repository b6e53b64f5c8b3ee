"""A message is the same however its text comes, streamed or whole; a parser may do what tools and reasoning need."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from call_parser import CALL, CallParser
from hypothesis import given
from hypothesis import strategies as st

from quire_server.engine.request import FinishReason
from quire_server.frontend.output_processor import CompletionDelta
from quire_server.generation.fan_out import Generation
from quire_server.generation.messages import (
    Message,
    MessageFinishReason,
    MessageParser,
    PlainTextParser,
    build_parsers,
    collect_messages,
)

TEXTS = st.lists(st.sampled_from([CALL, "<", "<ca", "ll>", "call>", "a", "é", "漢", "🙂", "\n", " "])).map("".join)
CUTS = st.sets(st.integers(1, 60))
REASONS = st.sampled_from([FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT])


def cut(items: Any, cuts: set[int]) -> list[Any]:
    """Cut a text or a list into pieces; some may be empty."""
    marks = [0, *sorted(cuts), max(len(items), *cuts, 0)] if cuts else [0, len(items)]
    return [items[start:end] for start, end in itertools.pairwise(marks)]


def feed(parser: MessageParser, pieces: Sequence[str], reason: FinishReason) -> Message:
    message = Message()
    for number, piece in enumerate(pieces, start=1):
        finish_reason = reason if number == len(pieces) else None
        delta = CompletionDelta(
            request_id="r", text=piece, token_ids=[number], num_output_tokens=number, finish_reason=finish_reason
        )
        parsed = parser.feed(delta)
        assert parsed.completion is delta
        assert (parsed.finish_reason is None) == (finish_reason is None)
        assert all(fragment.text for fragment in parsed.fragments)
        message.add(parsed)
    return message


@given(text=TEXTS, cuts=CUTS, reason=REASONS)
def test_plain_text_is_content_however_it_is_cut(text: str, cuts: set[int], reason: FinishReason) -> None:
    pieces = cut(text, cuts)
    message = feed(PlainTextParser(), pieces, reason)
    assert (message.content, message.finish_reason) == (text, reason.value)
    assert message.answer.token_ids == list(range(1, len(pieces) + 1))


@given(text=TEXTS, cuts=CUTS, reason=REASONS)
def test_a_parser_may_hold_text_back_see_tokens_and_change_the_end(
    text: str, cuts: set[int], reason: FinishReason
) -> None:
    parser = CallParser()
    message = feed(parser, cut(text, cuts), reason)
    assert message.content == text.replace(CALL, "")
    assert message.finish_reason == ("tool_calls" if CALL in text else reason.value)
    assert parser.token_ids == message.answer.token_ids


@pytest.mark.parametrize("build_parser", [PlainTextParser, CallParser])
@given(text=TEXTS, cuts=CUTS, num_merged=st.integers(1, 3))
def test_streamed_and_whole_messages_are_the_same_from_token_ids_on(
    tokenizer, build_world, build_parser: Callable[[], MessageParser], text: str, cuts: set[int], num_merged: int
) -> None:
    """The engine's tokens are bytes, so that characters are cut too; outputs that come together are merged."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = cut(token_ids, cuts)

    async def play(world: Any) -> None:
        for number, piece in enumerate(pieces, start=1):
            is_last = number == len(pieces)
            world.engine.emit(0, new_token_ids=piece, finish_reason=FinishReason.LENGTH if is_last else None)
            if number % num_merged == 0:
                for _ in range(3):
                    await asyncio.sleep(0)

    async def read_whole(world: Any) -> Message:
        generation = await Generation.start(world.frontend, world.ask("a"))
        messages, _ = await asyncio.gather(collect_messages(generation, [build_parser()]), play(world))
        return messages[0]

    async def read_streamed(world: Any) -> tuple[str, MessageFinishReason | None]:
        generation = await Generation.start(world.frontend, world.ask("a"))
        parser, player = build_parser(), asyncio.ensure_future(play(world))
        texts: list[str] = []
        finish_reason = None
        async for _, delta in generation.deltas():
            parsed = parser.feed(delta)
            texts += [fragment.text for fragment in parsed.fragments]
            assert finish_reason is None
            finish_reason = parsed.finish_reason
        await player
        return "".join(texts), finish_reason

    whole = asyncio.run(read_whole(build_world()))
    hidden = CALL if build_parser is CallParser else None
    assert whole.content == (text.replace(CALL, "") if hidden else text)
    assert whole.finish_reason == ("tool_calls" if hidden and hidden in text else "length")
    assert whole.answer.token_ids == token_ids
    assert asyncio.run(read_streamed(build_world())) == (whole.content, whole.finish_reason)


def test_each_choice_has_a_parser_of_its_own(world) -> None:
    parsers = build_parsers(world.ask("a", "b", n=3))
    assert len({id(parser) for parser in parsers}) == 6


def test_every_end_but_an_error_is_an_end_of_a_message() -> None:
    assert {reason.value for reason in FinishReason} - {reason.value for reason in MessageFinishReason} == {"error"}
