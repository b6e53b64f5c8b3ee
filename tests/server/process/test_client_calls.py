"""Calls and branches over the bridge, against a process that speaks the messages."""

import asyncio
import os
import signal

import pytest
from client_helpers import MakeRequest, OpenClient, collect, run, tokens_of, until

from quire_server.engine.border.calls import Reply, ResetPrefixCache
from quire_server.engine.output import EngineCoreOutput
from quire_server.engine.request import FinishReason
from quire_server.shared.errors import (
    DrainingError,
    EngineDeadError,
    InternalError,
    ModelLoadingError,
    QuireError,
    UnavailableError,
)


def by_branch(outputs: list[EngineCoreOutput]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for output in outputs:
        tokens.setdefault(output.branch, []).extend(output.new_token_ids)
    return tokens


def test_branches_of_one_request_are_told_apart_and_end_it_together(
    open_client: OpenClient, make_request: MakeRequest
) -> None:
    async def check() -> None:
        async with open_client("branches") as client:
            quick = client.generate(make_request("quick", 6, num_branches=3))
            slow = client.generate(make_request("slow", 6, num_branches=3))
            outputs = await collect(quick)
            await until(lambda: client.num_open_requests == 0)
            merged = await collect(slow)
            assert len(merged) == 3  # one a branch: what waited was never mixed
            for each in (outputs, merged):
                assert by_branch(each) == {
                    0: [65, 66, 67, 68, 69, 70],
                    1: [66, 67, 68, 69, 70],
                    2: [67, 68, 69, 70],
                }
                ends = [output.branch for output in each if output.finish_reason is FinishReason.LENGTH]
                assert sorted(ends) == [0, 1, 2]
                assert each[-1].branch == 0
            assert client.stats.num_preemptions == 0

    run(check())


def test_a_request_of_branches_that_goes_wrong_ends_once(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("branches") as client:
            outputs = await collect(client.generate(make_request("bad", 5, first_token=66, num_branches=2)))
            assert by_branch(outputs) == {0: [66, 67, 68, 69], 1: [67, 68, 69, 70]}
            assert [output.finish_reason for output in outputs][-2:] == [FinishReason.LENGTH, FinishReason.ERROR]
            assert client.num_open_requests == 0

    run(check())


def test_closing_a_request_of_branches_aborts_it_once(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("holds") as client:
            stream = client.generate(make_request("a", num_branches=2))
            await anext(stream)
            stream.end_branch(0)
            assert client.num_open_requests == 1
            stream.end_branch(1)
            assert client.num_open_requests == 0
            await until(lambda: client.stats.num_preemptions == 1)

    run(check())


def test_calls_are_answered_while_requests_run(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("echo") as client:
            reader = asyncio.create_task(collect(client.generate(make_request("a", 20))))
            await asyncio.gather(*(client.call(ResetPrefixCache()) for _ in range(10)))
            assert tokens_of(await reader) == list(range(65, 85))

    run(check())


@pytest.mark.parametrize(
    ("behaviour", "kind", "retry_after_s"),
    [("refuses-calls", UnavailableError, 3.0), ("fails-calls", InternalError, None)],
)
def test_what_the_engine_refuses_is_raised(
    open_client: OpenClient, behaviour: str, kind: type[QuireError], retry_after_s: float | None
) -> None:
    async def check() -> None:
        async with open_client(behaviour) as client:
            with pytest.raises(kind) as caught:
                await client.call(ResetPrefixCache())
            assert type(caught.value) is kind
            assert caught.value.retry_after_s == retry_after_s

    run(check())


@pytest.mark.parametrize("end", ["timeout", "death", "stop", "cancel"])
def test_a_call_that_is_not_answered_ends_all_the_same(open_client: OpenClient, end: str) -> None:
    async def check() -> None:
        async with open_client("holds") as client:
            timeout_s = 0.05 if end == "timeout" else 100.0
            call = asyncio.create_task(client.call(ResetPrefixCache(), timeout_s=timeout_s))
            await until(lambda: len(client._calls) == 1)
            if end == "death":
                os.kill(client._process.pid, signal.SIGKILL)
            elif end == "stop":
                await client.stop()
            elif end == "cancel":
                call.cancel()
            expected = {
                "timeout": UnavailableError,
                "death": EngineDeadError,
                "stop": EngineDeadError,
                "cancel": asyncio.CancelledError,
            }
            with pytest.raises(expected[end]):
                await call
            assert len(client._calls) == 0
            assert client.is_alive == (end != "death")
            client._dispatch(Reply.succeeded(0, None))  # an answer that comes too late is dropped

    run(check())


def test_a_drain_does_not_wait_for_calls_which_go_on_until_the_stop(open_client: OpenClient) -> None:
    async def check() -> None:
        async with open_client("holds") as client:
            answered, held = (asyncio.create_task(client.call(ResetPrefixCache())) for _ in range(2))
            await until(lambda: len(client._calls) == 2)
            assert await client.drain(100.0) == 0
            client._dispatch(Reply.succeeded(0, None))
            assert await answered is None
            assert not held.done()
        with pytest.raises(EngineDeadError):
            await held

    run(check())


def test_no_call_is_made_of_an_engine_that_takes_none(open_client: OpenClient) -> None:
    async def check() -> None:
        async with open_client("never-ready", wait=False) as client:
            with pytest.raises(ModelLoadingError):
                await client.call(ResetPrefixCache())
        async with open_client("echo") as client:
            client.begin_drain()
            with pytest.raises(DrainingError):
                await client.call(ResetPrefixCache())

    run(check())
