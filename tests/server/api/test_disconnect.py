"""A client that leaves ends the work done for it, whichever way it was being answered."""

import asyncio

import pytest

from quire_server.api.sse import EventStream

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_outputs", [0, 2])
async def test_hanging_up_aborts_in_the_engine(world, n, stream, num_outputs):
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, "n": n}
    exchange = world.exchange(CHAT, body)
    last = await world.engine.next_request(n - 1)
    for _ in range(num_outputs):
        world.engine.emit(world.engine.output(last, "x"))
        await asyncio.sleep(0)
    await exchange.hang_up()
    assert sorted(world.engine.aborted) == sorted(request.request_id for request in world.engine.requests)
    assert world.engine.num_open_requests == 0


async def test_hanging_up_is_counted_as_an_abort(world):
    exchange = world.exchange("/v1/completions", {"prompt": "x", "stream": True})
    await world.engine.next_request()
    await exchange.hang_up()
    metrics = (await world.http.get("/metrics")).text
    assert 'vllm:request_success_total{model_name="tiny",engine="0",finished_reason="abort"} 1.0' in metrics


async def test_hanging_up_while_sending_the_body(world):
    incoming = iter([{"type": "http.request", "body": b'{"prompt"', "more_body": True}, {"type": "http.disconnect"}])
    sent = []

    async def receive():
        return next(incoming)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await world.app(scope, receive, send)
    assert sent[0]["status"] == 499
    assert world.engine.requests == []


async def test_a_slow_client_holds_back_nobody_and_gets_everything_in_few_chunks(world):
    """While a write blocks, outputs gather; they go out together."""
    exchange = world.exchange("/v1/completions", {"prompt": "x", "stream": True})
    request = await world.engine.next_request()
    for _ in range(50):
        world.engine.emit(world.engine.output(request, "y"))
    assert (await exchange.next_message())["status"] == 200
    assert b"y" * 50 in (await exchange.next_message())["body"]
    await exchange.hang_up()


async def test_closing_happens_even_where_the_source_never_ran():
    """The client is gone before the first turn of the worker."""
    closed = []

    async def source():
        raise AssertionError
        yield b""

    async def close():
        closed.append(True)

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.Event().wait()

    await EventStream(source(), close)({"type": "http"}, receive, send)
    assert closed == [True]


async def test_cancellation_of_the_server_task_aborts_too(world):
    exchange = world.exchange("/v1/completions", {"prompt": "x", "stream": True})
    request = await world.engine.next_request()
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.task
    assert world.engine.aborted == [request.request_id]
