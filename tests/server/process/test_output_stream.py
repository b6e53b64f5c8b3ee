"""One request's outputs, of one branch or of several."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_server.engine.border.output_stream import OutputStream
from quire_server.engine.output import EngineCoreOutput
from quire_server.engine.request import FinishReason
from quire_server.shared.errors import DrainingError, UnavailableError


def output(branch: int, *token_ids: int, finish: FinishReason | None = None) -> EngineCoreOutput:
    return EngineCoreOutput(request_id="r", branch=branch, new_token_ids=list(token_ids), finish_reason=finish)


def last(branch: int, *token_ids: int) -> EngineCoreOutput:
    return output(branch, *token_ids, finish=FinishReason.LENGTH)


def run(check: Callable[[OutputStream, list[str]], object], num_branches: int) -> None:
    async def body() -> None:
        closed: list[str] = []
        result = check(OutputStream("r", closed.append, num_branches=num_branches), closed)
        if asyncio.iscoroutine(result):
            await asyncio.wait_for(result, 20)

    asyncio.run(body())


async def read_all(stream: OutputStream) -> list[tuple[int, list[int], bool]]:
    return [(each.branch, each.new_token_ids, each.finish_reason is not None) async for each in stream]


def test_branches_are_merged_apart() -> None:
    async def check(stream: OutputStream, closed: list[str]) -> None:
        for token_id in range(3):
            stream.put(output(0, token_id))
            stream.put(output(1, 10 + token_id))
        assert [each.new_token_ids for each in (await anext(stream), await anext(stream))] == [[0, 1, 2], [10, 11, 12]]
        stream.put(last(1, 13))
        assert not stream._is_complete
        stream.put(output(0, 3))
        stream.put(last(0))
        assert stream._is_complete
        assert await read_all(stream) == [(1, [13], True), (0, [3], True)]
        assert closed == []

    run(check, 2)


def test_no_branch_starves_behind_one_that_says_more() -> None:
    async def check(stream: OutputStream, closed: list[str]) -> None:
        read = []
        for _ in range(4):
            stream.put(output(0, 1))
            stream.put(output(1, 1))
            read.append((await anext(stream)).branch)
        assert read == [0, 1, 0, 1]

    run(check, 2)


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
@pytest.mark.parametrize("has_ended", [True, False])
def test_an_error_or_an_abort_ends_every_branch_and_is_read_last(reason: FinishReason, has_ended: bool) -> None:
    async def check(stream: OutputStream, closed: list[str]) -> None:
        stream.put(last(0, 1) if has_ended else output(0, 1))
        if has_ended:
            assert (await anext(stream)).finish_reason is FinishReason.LENGTH
        stream.put(output(1, 2))
        stream.put(output(0, finish=reason))
        assert stream._is_complete
        stream.put(output(1, 3))
        assert [each[0] for each in await read_all(stream)] == [1, 0]
        assert closed == []

    run(check, 2)


def test_a_branch_ended_by_its_reader_is_dropped_and_the_last_one_aborts() -> None:
    async def check(stream: OutputStream, closed: list[str]) -> None:
        stream.put(output(0, 1))
        await anext(stream)
        stream.put(output(0, 2))
        stream.end_branch(0)
        stream.put(output(0, 3))
        stream.put(output(1, 4))
        assert (await anext(stream)).new_token_ids == [4]
        assert closed == []
        stream.end_branch(1)
        assert closed == ["r"]
        assert await read_all(stream) == []

    run(check, 2)


def test_a_branch_that_its_reader_ended_is_aborted_once_the_engine_has_ended_the_others() -> None:
    """The engine still makes it: only an abort stops that."""

    async def check(stream: OutputStream, closed: list[str]) -> None:
        stream.put(output(0, 1))
        await anext(stream)
        stream.end_branch(0)
        stream.put(last(1, 2))
        assert stream._is_complete
        assert not stream.has_ended_in_engine
        assert closed == ["r"]
        assert await read_all(stream) == [(1, [2], True)]
        stream.end_branch(1)
        stream.close()
        assert closed == ["r"]
        stream.put(output(0, finish=FinishReason.ABORT))
        assert stream.has_ended_in_engine
        assert await read_all(stream) == []

    run(check, 2)


def test_a_branch_ended_by_its_reader_while_the_other_end_waits_is_aborted_at_once() -> None:
    async def check(stream: OutputStream, closed: list[str]) -> None:
        stream.put(last(1, 2))
        stream.end_branch(0)
        assert closed == ["r"]
        assert await read_all(stream) == [(1, [2], True)]

    run(check, 2)


def test_a_branch_that_both_ended_needs_no_abort() -> None:
    async def check(stream: OutputStream, closed: list[str]) -> None:
        stream.put(output(0, 1))
        stream.end_branch(0)
        stream.put(last(0, 2))
        stream.put(last(1, 3))
        assert stream.has_ended_in_engine
        assert await read_all(stream) == [(1, [3], True)]
        assert closed == []

    run(check, 2)


def test_the_end_of_the_whole_leaves_a_branchs_own_end_to_be_read() -> None:
    async def check(stream: OutputStream, closed: list[str]) -> None:
        stream.put(last(0, 1))
        stream.put(output(1, 2))
        stream.put(output(0, finish=FinishReason.ABORT))
        read = [(each.branch, each.new_token_ids, each.finish_reason) async for each in stream]
        assert read == [(0, [1], FinishReason.LENGTH), (1, [2], None), (0, [], FinishReason.ABORT)]
        assert closed == []

    run(check, 2)


def test_the_end_of_the_whole_outlives_the_branch_that_it_names() -> None:
    """Branch 1 still has to hear of it, though the reader wants nothing more of branch 0."""

    async def check(stream: OutputStream, closed: list[str]) -> None:
        stream.put(output(0, 1))
        stream.put(output(0, 2, finish=FinishReason.ABORT))
        stream.end_branch(0)
        assert [(each.new_token_ids, each.finish_reason) async for each in stream] == [([], FinishReason.ABORT)]
        assert closed == []

    run(check, 2)


def test_a_branch_read_to_its_end_leaves_the_others_to_be_read() -> None:
    async def check(stream: OutputStream, closed: list[str]) -> None:
        stream.put(last(0, 1))
        stream.put(last(1, 2))
        read = []
        async for each in stream:
            read.append(each.branch)
            stream.end_branch(each.branch)
        assert read == [0, 1]
        assert closed == []

    run(check, 2)


def test_an_error_in_place_of_the_end_is_raised_though_a_branch_was_read_to_its_end() -> None:
    async def check(stream: OutputStream, closed: list[str]) -> None:
        stream.put(last(0, 1))
        stream.fail(DrainingError("over"))
        await anext(stream)
        stream.end_branch(0)
        with pytest.raises(DrainingError):
            await anext(stream)

    run(check, 2)


def test_a_failed_request_carries_its_error() -> None:
    failed = EngineCoreOutput.failed("r", UnavailableError("Not now.", 3.0))
    assert failed.ends_request
    assert failed.error is not None
    assert (failed.error.code, failed.error.retry_after_s) == ("UnavailableError", 3.0)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_whatever_the_order_each_branch_is_read_whole_and_ends_once(branches, random) -> None:
    """Outputs of the branches interleaved at will, read at will: nothing is lost, doubled or told of another."""

    async def check(stream: OutputStream, closed: list[str]) -> None:
        todo = [branch for branch, tokens in enumerate(branches) for _ in tokens]
        random.shuffle(todo)
        num_put = [0] * len(branches)
        read: list[list[int]] = [[] for _ in branches]
        ends = [0] * len(branches)

        async def take() -> None:
            each = await anext(stream)
            assert not ends[each.branch], "nothing follows the end"
            read[each.branch] += each.new_token_ids
            ends[each.branch] += each.finish_reason is not None

        for branch in todo:
            position = num_put[branch]
            num_put[branch] += 1
            is_last = num_put[branch] == len(branches[branch])
            token_id = branches[branch][position]
            stream.put(last(branch, token_id) if is_last else output(branch, token_id))
            if random.random() < 0.4:
                await take()
        assert stream._is_complete
        async for each in stream:
            read[each.branch] += each.new_token_ids
            ends[each.branch] += each.finish_reason is not None
        assert read == branches
        assert ends == [1] * len(branches)
        assert closed == []

    run(check, len(branches))
