"""Replicas that go while requests come: held, not lost; and whoever waits hears of a change at once."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

import httpx2
import pytest

from quire_gateway import holding
from quire_gateway.backends import Backend, Model, StaticBackends
from quire_gateway.demand import DemandTable
from quire_gateway.holding import Holder

KEY = "default/tiny"


def run(story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await story

    asyncio.run(bounded())


@pytest.fixture(autouse=True)
def _short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "AWAY_PAUSE_S", 0.01)


def ok(_: httpx2.Request) -> httpx2.Response:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"ok":1}'

    return httpx2.Response(200, headers={"content-type": "application/json"}, content=pieces())


def draining(_: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(503, json={"error": {"code": 503, "reason": "draining"}})


def refusing(_: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("refused")


def tiny(namespace: str = "default", *, name: str = "tiny", port: int | None = None, **fields: Any) -> Model:
    backends = () if port is None else (Backend(host="replica", port=port),)
    return Model(**{"namespace": namespace, "name": name, "served_names": (name,), "backends": backends, **fields})


@pytest.mark.parametrize("away", [draining, refusing])
def test_the_only_replica_goes_and_the_next_one_answers(world: Any, away: Any) -> None:
    async def story() -> None:
        here = world(lambda request: away(request) if request.url.port == 1 else ok(request))
        here.set(backends=(Backend(host="replica", port=1),))
        request = here.chat()
        while not here.seen:
            await asyncio.sleep(0)
        here.set(backends=())
        await asyncio.sleep(0.05)
        assert here.gateway.demands[KEY].waiting == 1, "it is held, which wakes the model"
        here.set(backends=(Backend(host="replica", port=2),))
        assert json.loads(await request.rest()) == {"ok": 1}
        assert request.status == 200

    run(story())


def test_a_replica_that_restarts_at_the_same_address_answers(world: Any) -> None:
    async def story() -> None:
        here = world(lambda request: refusing(request) if len(here.seen) < 3 else ok(request))
        here.ready()
        request = here.chat()
        assert json.loads(await request.rest()) == {"ok": 1}
        assert len(here.seen) == 3

    run(story())


def test_a_stream_hears_that_it_waits_again(world: Any) -> None:
    async def story() -> None:
        here = world(lambda request: draining(request) if request.url.port == 1 else ok(request))
        here.set(backends=(Backend(host="replica", port=1),))
        request = here.chat(stream=True)
        assert (await request.next()).startswith(b": waiting phase=")
        here.set(backends=(Backend(host="replica", port=2),))
        assert b'{"ok":1}' in await request.rest()

    run(story())


def test_a_request_that_breaks_the_replicas_it_reaches_is_not_sent_for_ever(world: Any) -> None:
    """One that was taken, and had its connection broken, may be the cause: it must not end each new replica too."""

    async def story() -> None:
        here = world(lambda _: httpx2.Response(200), cold_start_timeout_s=5.0)

        def breaking(_: httpx2.Request) -> httpx2.Response:
            here.set(backends=(Backend(host="replica", port=len(here.seen) + 1),))  # the next one stands in
            raise httpx2.ReadError("reset")

        here.handler = breaking
        here.ready()
        request = here.chat()
        error = json.loads(await request.rest())["error"]
        assert (request.status, error["reason"]) == (502, "replica_failed")
        assert "reset" in error["message"]
        assert len(here.seen) == 3

    run(story())


def test_the_queue_of_those_who_wait_again_is_bounded_too(world: Any) -> None:
    async def story() -> None:
        here = world(draining, max_queue=1)
        here.ready()
        first = here.chat()
        while not here.gateway.demands[KEY].waiting:
            await asyncio.sleep(0)
        here.set(heartbeat_s=5.0)
        second = here.chat()
        error = json.loads(await second.rest())["error"]
        assert (second.status, error["reason"]) == (429, "queue_full")
        first.hang_up()
        await first.rest()

    run(story())


def test_cold_start_reject_does_not_hold_for_a_replica_that_goes(world: Any) -> None:
    async def story() -> None:
        here = world(draining, cold_start="Reject", status="")
        here.ready()
        request = here.chat()
        body = json.loads(await request.rest())
        assert (request.status, body["error"]["reason"]) == (503, "model_loading")
        assert "its replicas take no requests just now" in body["error"]["message"]

    run(story())


def test_a_replica_that_is_ready_while_a_slow_client_is_written_to_is_noticed_at_once() -> None:
    async def story() -> None:
        backends = StaticBackends()
        backends.set(tiny(heartbeat_s=100.0))
        beats = Holder(backends, DemandTable()).hold(KEY, since=asyncio.get_running_loop().time())
        async with aclosing(beats):
            await anext(beats)
            backends.set(tiny(port=1, heartbeat_s=100.0))  # while the client takes the first comment
            async with asyncio.timeout(1.0):
                assert await anext(beats, None) is None

    run(story())


def test_only_who_waits_for_a_model_is_woken_by_its_change() -> None:
    async def story() -> None:
        backends = StaticBackends()
        for name in ("tiny", "other"):
            backends.set(tiny(name=name))
        waiting = {key: asyncio.create_task(backends.changed(key, backends.get(key))) for key in (KEY, "default/other")}
        await asyncio.sleep(0)
        backends.set(tiny(port=1))
        await waiting[KEY]
        assert not waiting["default/other"].done()
        backends.remove("default/other")
        await waiting["default/other"]
        await backends.changed(KEY, None)  # it is another object than None already

    run(story())


def test_an_equal_model_is_no_change() -> None:
    async def story() -> None:
        backends = StaticBackends()
        backends.set(tiny())
        seen = backends.get(KEY)
        backends.set(tiny())
        assert backends.get(KEY) is seen

    run(story())


def test_lookups_follow_what_changes() -> None:
    backends = StaticBackends()
    backends.set(tiny(served_names=("a", "b")))
    backends.set(tiny("team", served_names=("b",)))
    assert [model.namespace for model in backends.serving("b")] == ["default", "team"]
    assert [model.namespace for model in backends.named("tiny")] == ["default", "team"]
    backends.set(tiny(served_names=("c",)))
    assert [model.namespace for model in backends.serving("b")] == ["team"]
    assert [model.namespace for model in backends.serving("c")] == ["default"]
    backends.remove("team/tiny")
    assert (backends.serving("b"), len(backends.named("tiny"))) == ((), 1)


@pytest.mark.parametrize("host", ["tiny", "TINY:80", "tiny."])
def test_a_short_host_names_the_model_of_its_own_namespace(world: Any, host: str) -> None:
    """`http://tiny/` in a pod is `tiny` of that pod's namespace, whatever other models answer to the body's name."""

    async def story() -> None:
        here = world(ok)
        here.backends.set(tiny("team", name="elsewhere", port=9, served_names=("tiny-chat",)))
        here.set(backends=(Backend(host="replica", port=1),))
        request = here.chat(model="tiny-chat", host=host)
        await request.rest()
        assert [request.url.port for request in here.seen] == [1]

    run(story())


@pytest.mark.parametrize(("host", "model"), [("tiny", "whatever"), ("localhost:8080", "tiny")])
def test_what_two_namespaces_have_is_refused_with_the_choices(world: Any, host: str, model: str) -> None:
    async def story() -> None:
        here = world(ok)
        here.ready()
        here.backends.set(tiny("team", port=9))
        request = here.chat(model=model, host=host)
        error = json.loads(await request.rest())["error"]
        assert (request.status, error["reason"], here.seen) == (400, "ambiguous_model", [])
        assert "tiny.default.svc, tiny.team.svc" in error["message"]
        in_full = here.chat(model=model, host="tiny.team.svc")
        await in_full.rest()
        assert [request.url.port for request in here.seen] == [9]

    run(story())
