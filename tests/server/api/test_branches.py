"""Several answers of one engine request, through the frontend: what n, best_of and beams will read."""

import pytest

from quire_server.engine.output import EngineCoreOutput
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.shared.errors import ContextLengthError
from quire_server.shared.sampling_params import SamplingParams

pytestmark = pytest.mark.anyio


def ask(world, num_branches, **params):
    return world.frontend.generate(
        EngineRequest(
            request_id="r",
            prompt_token_ids=world.tokenizer.encode("hi"),
            params=SamplingParams(max_tokens=9, **params),
            num_branches=num_branches,
        )
    )


async def test_a_stop_string_ends_its_branch_and_the_others_go_on(world):
    stream = ask(world, 2, stop=("END",))
    request = await world.engine.next_request()
    world.engine.emit(world.engine.output(request, "one END of it"), world.engine.output(request, "two", branch=1))
    first, second = await anext(stream), await anext(stream)
    assert (first.branch, first.text, first.finish_reason, first.stop_reason) == (0, "one ", FinishReason.STOP, "END")
    assert (second.branch, second.finish_reason) == (1, None)
    assert world.engine.num_open_requests == 1
    assert world.engine.aborted == []
    world.engine.emit(
        world.engine.output(request, "which nobody reads"),
        world.engine.output(request, "!", branch=1, finish_reason=FinishReason.LENGTH),
    )
    (third,) = [delta async for delta in stream]
    assert (third.branch, second.text + third.text, third.finish_reason) == (1, "two!", FinishReason.LENGTH)
    assert world.engine.aborted == ["r"], "branch 0 runs on in the engine"
    assert world.engine.num_open_requests == 0


async def test_the_last_branch_that_a_stop_string_ends_aborts_the_request(world):
    stream = ask(world, 2, stop=("END",))
    request = await world.engine.next_request()
    for branch in (1, 0):
        assert world.engine.aborted == []
        world.engine.emit(world.engine.output(request, "END", branch=branch))
        assert (await anext(stream)).branch == branch
    assert world.engine.aborted == ["r"]
    assert [delta async for delta in stream] == []
    assert world.engine.num_open_requests == 0


async def test_an_error_ends_all_of_it_as_what_it_was(world):
    stream = ask(world, 2)
    request = await world.engine.next_request()
    failed = EngineCoreOutput.failed("r", ContextLengthError("Too long.", "prompt"))
    world.engine.emit(world.engine.output(request, "so far", branch=1), failed)
    deltas = [delta async for delta in stream]
    assert [(delta.branch, delta.finish_reason) for delta in deltas] == [(1, None), (0, FinishReason.ERROR)]
    assert isinstance(deltas[-1].error, ContextLengthError)
    assert world.engine.num_open_requests == 0


async def test_an_error_that_names_a_branch_with_an_end_of_its_own_adds_no_text_to_it(world):
    stream = ask(world, 2)
    request = await world.engine.next_request()
    world.engine.emit(world.engine.output(request, "one", finish_reason=FinishReason.LENGTH))
    world.engine.emit(EngineCoreOutput.failed("r", ContextLengthError("Too long.", "prompt")))
    deltas = [delta async for delta in stream]
    assert [(delta.branch, delta.text, delta.finish_reason, delta.num_output_tokens) for delta in deltas] == [
        (0, "one", FinishReason.LENGTH, 3),
        (0, "", FinishReason.ERROR, 3),
    ]
