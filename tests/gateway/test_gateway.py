"""The gateway's contract, row by row: what a client gets in each situation."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import httpx2
import pytest

from quire_contract.phases import Phase


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(story)


def reply(status: int, body: str) -> httpx2.Response:
    """A response that arrives as a stream, as from a network."""

    async def pieces() -> AsyncIterator[bytes]:
        yield body.encode()

    return httpx2.Response(status, headers={"content-type": "application/json"}, content=pieces())


def answer(request: httpx2.Request) -> httpx2.Response:
    return reply(200, '{"ok":1}')


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def error_reason(body: bytes) -> str:
    return str(json.loads(body)["error"]["reason"])


def test_a_warm_model_answers_and_the_body_goes_through_verbatim(world: Any) -> None:
    async def story() -> None:
        here = world(answer)
        here.ready()
        request = here.chat()
        assert json.loads(await request.rest()) == {"ok": 1}
        assert request.status == 200
        assert here.seen[0].url == "http://replica:1/v1/chat/completions"
        assert json.loads(here.seen[0].content)["model"] == "tiny"

    run(story())


def test_an_unknown_model_is_404_in_openais_shape_with_vllms_code(world: Any) -> None:
    async def story() -> None:
        request = world(answer).chat(model="other")
        error = json.loads(await request.rest())["error"]
        assert error.keys() == {"message", "type", "param", "code", "reason"}, "as the servers' own"
        assert (request.status, error["code"], error["reason"]) == (404, 404, "model_not_found")

    run(story())


TRUE = (True, 1, 1.0, "1", "on", "t", "TRUE", "y", "Yes")
FALSE = (False, 0, 0.0, "0", "off", "f", "False", "n", "No", None)


@pytest.mark.parametrize(("value", "is_stream"), [*((value, True) for value in TRUE), *((v, False) for v in FALSE)])
def test_stream_is_read_in_every_spelling_of_pydantic(world: Any, exchange: Any, value: Any, is_stream: bool) -> None:
    """A server behind takes them all; a gateway that does not would be another API."""
    sent = json.dumps({"model": "tiny", "stream": value}).encode()

    async def story() -> None:
        here = world(answer)
        request = exchange(here.gateway, "POST", "/v1/completions", sent, "localhost")
        await settle()
        assert request.has_begun is is_stream, "only a stream hears that it waits"
        here.ready()
        assert b'{"ok":1}' in await request.rest()

    run(story())


@pytest.mark.parametrize("value", [2, "maybe", [], {}])
def test_what_is_no_spelling_of_a_flag_is_left_for_the_server_to_refuse(
    world: Any, exchange: Any, value: object
) -> None:
    async def story() -> None:
        here = world(lambda _: reply(400, "{}"))
        here.ready()
        sent = json.dumps({"model": "tiny", "stream": value}).encode()
        request = exchange(here.gateway, "POST", "/v1/completions", sent, "localhost")
        await request.rest()
        assert (request.status, here.seen[0].content) == (400, sent)

    run(story())


@pytest.mark.parametrize(
    "sent", [b"{nope", b"[]", b'{"model": "\xff"}', b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"]
)
def test_a_body_that_is_no_json_is_400(world: Any, exchange: Any, sent: bytes) -> None:
    async def story() -> None:
        request = exchange(world(answer).gateway, "POST", "/v1/completions", sent, "localhost")
        body = await request.rest()
        assert (request.status, error_reason(body)) == (400, "invalid_request")

    run(story())


@pytest.mark.parametrize("host", ["tiny.default.svc", "tiny.default", "TINY.default.svc.cluster.local:80"])
def test_the_host_names_the_model_where_the_body_does_not(world: Any, host: str) -> None:
    async def story() -> None:
        here = world(answer)
        here.ready()
        request = here.chat(model="whatever", host=host)
        await request.rest()
        assert request.status == 200

    run(story())


def test_a_suspended_model_is_refused_and_not_woken(world: Any) -> None:
    async def story() -> None:
        here = world(answer, is_suspended=True)
        request = here.chat()
        body = await request.rest()
        assert (request.status, error_reason(body)) == (503, "model_suspended")
        assert here.gateway.demands["default/tiny"].total(asyncio.get_running_loop().time()) == 0

    run(story())


def test_a_cold_request_is_held_until_a_replica_is_ready(world: Any) -> None:
    async def story() -> None:
        here = world(answer)
        request = here.chat()
        await settle()
        assert here.gateway.demands["default/tiny"].waiting == 1
        here.ready()
        await request.rest()
        assert request.status == 200
        demand = here.gateway.demands["default/tiny"]
        assert (demand.waiting, demand.in_flight) == (0, 0)

    run(story())


def test_a_cold_stream_starts_at_once_with_comments_and_then_the_tokens(world: Any) -> None:
    async def tokens() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        yield b"data: [DONE]\n\n"

    async def story() -> None:
        here = world(
            lambda _: httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=tokens()),
            phase=Phase.LOADING,
            eta_seconds=12.2,
            heartbeat_s=0.01,
        )
        request = here.chat(stream=True)
        assert await request.next() == b": waiting phase=Loading eta=12s\n\n"
        assert request.headers["content-type"].startswith("text/event-stream")
        assert await request.next() == b": waiting phase=Loading eta=12s\n\n"
        here.ready()
        assert (await request.rest()).endswith(b"data: 1\n\ndata: [DONE]\n\n")

    run(story())


def test_an_error_after_a_cold_stream_began_is_its_last_event(world: Any) -> None:
    async def story() -> None:
        here = world(lambda _: reply(400, '{"error":{"reason":"bad"}}'))
        request = here.chat(stream=True)
        await request.next()
        here.ready()
        body = await request.rest()
        assert b'data: {"error":{"reason":"bad"}}\n\ndata: [DONE]\n\n' in body

    run(story())


def test_a_cold_request_that_waits_too_long_is_503_with_retry_after(world: Any) -> None:
    async def story() -> None:
        here = world(answer, cold_start_timeout_s=0.02, eta_seconds=7.0)
        request = here.chat()
        body = await request.rest()
        assert (request.status, error_reason(body)) == (503, "model_loading")
        assert request.headers["retry-after"] == "7"
        assert "no replica" in json.loads(body)["error"]["message"]

    run(story())


def test_a_cold_stream_that_waits_too_long_ends_with_an_error_event(world: Any) -> None:
    async def story() -> None:
        request = world(answer, cold_start_timeout_s=0.02).chat(stream=True)
        body = await request.rest()
        assert request.status == 200
        assert b'"code":503,"reason":"model_loading"' in body
        assert body.endswith(b"data: [DONE]\n\n")

    run(story())


def test_cold_start_reject_refuses_but_wakes(world: Any) -> None:
    async def story() -> None:
        here = world(answer, cold_start="Reject")
        request = here.chat()
        body = await request.rest()
        assert (request.status, error_reason(body)) == (503, "model_loading")
        assert here.gateway.demands["default/tiny"].total(asyncio.get_running_loop().time()) == 1

    run(story())


def test_the_queue_in_front_of_a_cold_model_is_bounded(world: Any) -> None:
    async def story() -> None:
        here = world(answer, max_queue=1)
        first = here.chat()
        await settle()
        second = here.chat()
        body = await second.rest()
        assert (second.status, error_reason(body)) == (429, "queue_full")
        assert "retry-after" in second.headers
        here.ready()
        await first.rest()
        assert first.status == 200

    run(story())


def test_a_client_that_hangs_up_leaves_the_queue_and_a_lease(world: Any) -> None:
    async def story() -> None:
        here = world(answer)
        request = here.chat(stream=True)
        await request.next()
        request.hang_up()
        await request.rest()
        demand = here.gateway.demands["default/tiny"]
        now = asyncio.get_running_loop().time()
        assert demand.waiting == 0
        assert demand.total(now) == 1
        assert demand.total(now + 60) == 0

    run(story())


def test_a_client_that_hangs_up_in_mid_answer_closes_the_upstream_request(world: Any) -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async def story() -> None:
        here = world(lambda _: httpx2.Response(200, content=endless()))
        here.ready()
        request = here.chat(stream=True)
        await request.next()
        request.hang_up()
        await request.rest()
        assert closed.is_set()
        assert here.gateway.demands["default/tiny"].in_flight == 0

    run(story())


def test_a_replica_that_refuses_is_passed_over(world: Any) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.url.port == 1:
            raise httpx2.ConnectError("refused")
        return answer(request)

    async def story() -> None:
        here = world(handler)
        here.ready(2)
        request = here.chat()
        await request.rest()
        assert request.status == 200
        assert [r.url.port for r in here.seen] == [1, 2]

    run(story())


def test_where_all_replicas_drain_for_too_long_the_last_answer_is_given(world: Any) -> None:
    async def story() -> None:
        here = world(lambda _: reply(503, '{"error":{"reason":"draining"}}'), away_patience_s=0.0)
        here.ready(5)
        request = here.chat()
        body = await request.rest()
        assert (request.status, error_reason(body)) == (503, "draining")
        assert len(here.seen) == 5, "draining is no failure: every replica was asked"

    run(story())


def test_a_replica_that_fails_is_tried_again_elsewhere_but_not_for_ever(world: Any) -> None:
    async def story() -> None:
        here = world(lambda _: reply(500, '{"error":{"reason":"broken"}}'))
        here.ready(5)
        request = here.chat()
        body = await request.rest()
        assert (request.status, error_reason(body)) == (500, "broken")
        assert len(here.seen) == 3

    run(story())


def test_no_reachable_replica_is_502_that_says_why(world: Any) -> None:
    def refuse(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("connection refused")

    async def story() -> None:
        here = world(refuse, away_patience_s=0.0)
        here.ready()
        request = here.chat()
        body = await request.rest()
        assert (request.status, error_reason(body)) == (502, "replica_failed")
        assert "replica:1: connection refused" in json.loads(body)["error"]["message"]

    run(story())


def test_a_stream_that_breaks_is_not_retried_and_ends_with_an_error_event(world: Any) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        raise httpx2.ReadError("reset")

    async def story() -> None:
        here = world(lambda _: httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=broken()))
        here.ready(2)
        request = here.chat(stream=True)
        body = await request.rest()
        assert body.startswith(b"data: 1\n\n")
        assert b"replica_failed" in body
        assert b"`tiny`" in body
        assert body.endswith(b"data: [DONE]\n\n")
        assert len(here.seen) == 1

    run(story())


def test_an_answer_in_one_piece_that_breaks_is_left_unfinished(world: Any) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b'{"choices":'
        raise httpx2.ReadError("reset")

    async def story() -> None:
        here = world(lambda _: httpx2.Response(200, headers={"content-type": "application/json"}, content=broken()))
        here.ready()
        request = here.chat()
        assert await request.next() == b'{"choices":'
        assert await request.rest() == b""
        assert request.is_open

    run(story())


def test_one_model_can_be_looked_up(world: Any) -> None:
    async def story() -> None:
        here = world(answer)
        assert json.loads(await here.get("/v1/models/alias").rest())["id"] == "alias"
        missing = here.get("/v1/models/none")
        assert error_reason(await missing.rest()) == "model_not_found"
        assert missing.status == 404

    run(story())


def test_a_request_that_names_no_model_is_told_so(world: Any, exchange: Any) -> None:
    async def story() -> None:
        request = exchange(world(answer).gateway, "POST", "/v1/completions", b"{}", "localhost:1")
        body = await request.rest()
        assert (request.status, error_reason(body)) == (404, "model_not_found")
        assert "`model`" in json.loads(body)["error"]["message"]

    run(story())


def test_probes_models_and_metrics_are_no_demand(world: Any) -> None:
    async def story() -> None:
        here = world(answer)
        names = json.loads(await here.get("/v1/models").rest())
        assert [m["id"] for m in names["data"]] == ["tiny", "alias"]
        assert await here.get("/readyz").rest() == b"ok"
        metrics = await here.get("/metrics").rest()
        assert b'{name="tiny",namespace="default"} 0.0' in metrics
        shown = json.loads(await here.get("/v1/demand/default/tiny").rest())
        assert shown == {"demand": 0, "waiting": 0, "inFlight": 0}
        assert (await here.get("/v1/demand/default/none").rest()).startswith(b'{"error"')

    run(story())
