"""A request for a vector, through the frontend: until a model makes any, what is heard is the engine's refusal."""

import pytest

from quire_server.engine.border.validation import validate_request
from quire_server.engine.output import EngineCoreOutput
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.pooling_params import PoolingParams, PoolingTask

pytestmark = pytest.mark.anyio


def ask(world, task=PoolingTask.EMBED):
    request = EngineRequest(request_id="p", prompt_token_ids=[1, 2], params=PoolingParams(task=task))
    return world.frontend.generate(request)


def count_of(world, reason):
    (line,) = (
        line
        for line in world.frontend.metrics.render().decode().splitlines()
        if line.startswith("vllm:request_success_total") and f'"{reason}"' in line
    )
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize("task", list(PoolingTask))
async def test_a_refusal_is_heard_as_what_it_was(world, task):
    stream = ask(world, task)
    request = await world.engine.next_request()
    with pytest.raises(InvalidRequestError) as refused:
        validate_request(request, 300)
    world.engine.emit(EngineCoreOutput.failed("p", refused.value))
    (delta,) = [delta async for delta in stream]
    assert (delta.finish_reason, delta.text, list(delta.token_ids)) == (FinishReason.ERROR, "", [])
    assert type(delta.error) is InvalidRequestError
    assert (delta.error.status, delta.error.param) == (400, "task")
    assert task.value in str(delta.error)
    await stream.aclose()
    assert count_of(world, "error") == 1
    assert count_of(world, "abort") == 0
    assert world.engine.num_open_requests == 0


async def test_an_abort_is_heard_and_a_closed_one_counted(world):
    stream = ask(world)
    world.engine.emit(EngineCoreOutput(request_id="p", finish_reason=FinishReason.ABORT))
    assert [delta.finish_reason async for delta in stream] == [FinishReason.ABORT]
    await ask(world).aclose()
    assert count_of(world, "abort") == 2
