"""Calls and their replies, of methods that give something back; every call ends once."""

import asyncio
from typing import Any, ClassVar

import pytest

from quire_server.engine.border.calls import Call, EngineMethod, Reply
from quire_server.engine.border.open_calls import OpenCalls
from quire_server.shared.errors import ConfigError, EngineDeadError, InternalError, StartupError


class CountBlocks(EngineMethod[dict[str, int]], frozen=True, tag=True):
    result_type: ClassVar[Any] = dict[str, int]
    kind: str


def test_replies_find_their_calls_in_any_order_and_are_decoded() -> None:
    async def check() -> None:
        sent: list[Call] = []
        calls = OpenCalls(sent.append)
        waiting = [asyncio.create_task(calls.ask(CountBlocks(kind), 60.0)) for kind in "abc"]
        await asyncio.sleep(0)
        assert len(calls) == len({call.call_id for call in sent}) == 3
        for number, call in reversed(list(enumerate(sent))):
            calls.settle(Reply.succeeded(call.call_id, {"free": number}))
            calls.settle(Reply.succeeded(call.call_id, {"free": 99}))  # the second is one too many
        calls.settle(Reply.succeeded(12345, None))
        assert await asyncio.gather(*waiting) == [{"free": 0}, {"free": 1}, {"free": 2}]
        assert len(calls) == 0

    asyncio.run(check())


def test_an_error_is_raised_as_what_it_was() -> None:
    async def check() -> None:
        sent: list[Call] = []
        calls = OpenCalls(sent.append)
        waiting = asyncio.create_task(calls.ask(CountBlocks("a"), 60.0))
        await asyncio.sleep(0)
        calls.settle(Reply.failed(sent[0].call_id, ConfigError("no such adapter", hint="look again")))
        with pytest.raises(StartupError) as caught:
            await waiting
        assert type(caught.value) is ConfigError
        assert caught.value.termination.hint == "look again"

    asyncio.run(check())


@pytest.mark.parametrize("result", [None, {"free": "many"}, [1]])
def test_a_result_of_another_type_is_a_bug(result: object) -> None:
    async def check() -> None:
        sent: list[Call] = []
        calls = OpenCalls(sent.append)
        waiting = asyncio.create_task(calls.ask(CountBlocks("a"), 60.0))
        await asyncio.sleep(0)
        calls.settle(Reply.succeeded(sent[0].call_id, result))
        with pytest.raises(InternalError, match="answer to CountBlocks"):
            await waiting
        assert len(calls) == 0

    asyncio.run(check())


def test_what_cannot_be_sent_is_not_open() -> None:
    def refuse(call: Call) -> None:
        raise TypeError("cannot be encoded")

    async def check() -> None:
        calls = OpenCalls(refuse)
        with pytest.raises(TypeError):
            await calls.ask(CountBlocks("a"), 60.0)
        assert len(calls) == 0

    asyncio.run(check())


def test_a_death_ends_every_call_with_an_error_of_its_own() -> None:
    async def check() -> None:
        calls = OpenCalls(lambda call: None)
        waiting = [asyncio.create_task(calls.ask(CountBlocks("a"), 60.0)) for _ in range(3)]
        await asyncio.sleep(0)
        calls.fail(lambda: EngineDeadError("gone"))
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [EngineDeadError] * 3
        assert len({id(end) for end in ends}) == 3

    asyncio.run(check())
