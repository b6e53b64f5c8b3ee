"""The gateway's ASGI application: admin paths, and everything else to a model."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import httpx2
import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from quire_contract import paths
from quire_contract.nesting import bounded_nesting
from quire_contract.spellings import WORD_TO_BOOL
from quire_gateway import errors
from quire_gateway.backends import Backends, Model
from quire_gateway.demand import DemandTable
from quire_gateway.errors import GatewayError
from quire_gateway.holding import Holder
from quire_gateway.metrics import GatewayMetrics
from quire_gateway.proxy import MAX_RETRIES, Proxy, ReplicasAwayError, UpstreamRequest, end_to_end
from quire_gateway.routing import match_model

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
MAX_BODY_BYTES = 64 << 20
AWAY_PATIENCE_S = 10.0
"""How long replicas may be said to be ready and not take a request, before its client is told so. One that goes is off
the list well within it, and then the request is held as for any cold model."""


class Peek(msgspec.Struct, frozen=True):
    """The two fields of a body that the gateway reads."""

    model: str | None = None
    stream: Any = None

    @property
    def is_stream(self) -> bool:
        """Whether events are asked for, in any spelling that the servers take; they refuse what is none."""
        if isinstance(self.stream, str):
            return WORD_TO_BOOL.get(self.stream.lower(), False)
        return bool(self.stream == 1)


class _ClientGoneError(Exception):
    """The client closed its connection."""


class Gateway:
    """An ASGI application over some `Backends`."""

    def __init__(
        self, backends: Backends, *, proxy: Proxy | None = None, away_patience_s: float = AWAY_PATIENCE_S
    ) -> None:
        self.backends = backends
        self.demands = DemandTable()
        self.holder = Holder(backends, self.demands)
        self.proxy = proxy or Proxy()
        self.away_patience_s = away_patience_s
        self._registry = CollectorRegistry()
        self.metrics = GatewayMetrics(self._registry, backends, self.demands)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.proxy.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path in (paths.LIVEZ, paths.READYZ):
            await _respond(send, 200, b"ok", b"text/plain")
        elif path == paths.METRICS:
            await _respond(send, 200, generate_latest(self._registry), CONTENT_TYPE_LATEST.encode())
        elif path == paths.MODELS and scope["method"] == "GET":
            body = msgspec.json.encode({"object": "list", "data": self._cards()})
            await _respond(send, 200, body, b"application/json")
        elif path.startswith(paths.MODELS + "/") and scope["method"] == "GET":
            await self._get_model(path.removeprefix(paths.MODELS + "/"), send)
        elif path.startswith(paths.DEMAND + "/"):
            await self._demand(path.removeprefix(paths.DEMAND + "/"), send)
        else:
            await _Exchange(self, scope, receive, send).run()

    def _cards(self) -> list[dict[str, Any]]:
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": "quire", "root": model.name}
            for model in self.backends.models()
            for name in model.served_names
        ]

    async def _get_model(self, name: str, send: Send) -> None:
        card = next((card for card in self._cards() if card["id"] == name), None)
        if card is None:
            await _respond_error(send, errors.model_not_found(name))
        else:
            await _respond(send, 200, msgspec.json.encode(card), b"application/json")

    async def _demand(self, key: str, send: Send) -> None:
        if self.backends.get(key) is None:
            await _respond_error(send, errors.model_not_found(key))
            return
        now = asyncio.get_running_loop().time()
        demand = self.demands[key]
        body = {"demand": demand.total(now), "waiting": demand.waiting, "inFlight": demand.in_flight}
        await _respond(send, 200, msgspec.json.encode(body), b"application/json")


class _Exchange:
    """One request of one client, from its head to the last byte of the answer."""

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway = gateway
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers_sent = False
        self._status = 0

    async def run(self) -> None:
        started = time.monotonic()
        model: Model | None = None
        try:
            body = await self._read_body()
            peek = self._peek(body)
            model = self._find(peek)
            self._gateway.holder.admit(model)
            await self._until_client_gone(self._serve(model, body, peek.is_stream))
        except GatewayError as error:
            await self._fail(error)
        except _ClientGoneError:
            self._status = 499
        if model is not None:
            self._gateway.metrics.observe(model, self._status, time.monotonic() - started)

    def _find(self, peek: Peek) -> Model:
        host = next((v.decode("latin-1") for k, v in self._scope["headers"] if k == b"host"), "")
        model = match_model(self._gateway.backends, host=host, model=peek.model)
        if model is None:
            raise errors.model_not_found(peek.model) if peek.model else errors.no_model_named(host)
        return model

    def _peek(self, body: bytes) -> Peek:
        if not body:
            return Peek()
        try:
            with bounded_nesting():
                return msgspec.json.decode(body, type=Peek)
        except ValueError as error:
            raise errors.bad_request(f"The body is not the JSON object it should be: {error}.") from None

    async def _read_body(self) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            event = await self._receive()
            if event["type"] == "http.disconnect":
                raise _ClientGoneError
            chunk: bytes = event.get("body", b"")
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise GatewayError(
                    status=413, reason="body_too_large", message=f"The body is over {MAX_BODY_BYTES} bytes."
                )
            chunks.append(chunk)
            if not event.get("more_body", False):
                return b"".join(chunks)

    async def _until_client_gone(self, serving: Awaitable[None]) -> None:
        """Run `serving`; a client that closes its connection ends it, which closes the upstream connection too."""
        work = asyncio.ensure_future(serving)
        gone = asyncio.ensure_future(self._wait_disconnect())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _ClientGoneError
            work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _wait_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _serve(self, model: Model, body: bytes, is_stream: bool) -> None:
        """Wait for a replica and send the request to it; where all of them are away, wait again.

        One that breaks the connection of each replica that takes it may be what breaks them: it is not sent for ever.
        """
        request = UpstreamRequest(
            method=self._scope["method"], target=_target(self._scope), headers=self._scope["headers"], body=body
        )
        clock = asyncio.get_running_loop().time
        since = clock()
        away: Model | None = None
        patience_end = since
        num_broken = 0
        while True:
            ready = await self._hold(model.key, since, away, is_stream)
            if ready is not away:
                patience_end = clock() + self._gateway.away_patience_s
            try:
                await self._send_to(ready, request, must_answer=clock() >= patience_end)
            except ReplicasAwayError as error:
                num_broken += error.num_broken
                if num_broken > MAX_RETRIES:
                    raise errors.replica_failed(model.name, str(error)) from None
                self._gateway.holder.admit_to_queue(ready)
                away = ready
            else:
                return

    async def _hold(self, key: str, since: float, away: Model | None, is_stream: bool) -> Model:
        """Wait until a replica is ready; a client that streams hears meanwhile what it waits for."""
        async with aclosing(self._gateway.holder.hold(key, since=since, away=away)) as beats:
            async for waiting in beats:
                if is_stream:
                    await self._start(200, SSE_HEADERS)
                    eta = "" if waiting.eta_seconds is None else f" eta={round(waiting.eta_seconds)}s"
                    await self._write(f": waiting phase={waiting.phase}{eta}\n\n".encode())
        model = self._gateway.backends.get(key)
        if model is None:
            raise errors.model_not_found(key)
        return model

    async def _send_to(self, model: Model, request: UpstreamRequest, *, must_answer: bool) -> None:
        demand = self._gateway.demands[model.key]
        demand.in_flight += 1
        try:
            async with self._gateway.proxy.send(model, request, must_answer=must_answer) as response:
                await self._relay(model, response)
        finally:
            demand.in_flight -= 1
            demand.touch(asyncio.get_running_loop().time())

    async def _relay(self, model: Model, response: httpx2.Response) -> None:
        is_stream = self._headers_sent or response.headers.get("content-type", "").startswith("text/event-stream")
        try:
            if self._headers_sent and response.status_code != 200:
                # The stream has begun, so the server's error body becomes its last event.
                await self._write(b"data: " + await response.aread() + b"\n\ndata: [DONE]\n\n")
            else:
                await self._start(response.status_code, end_to_end(response.headers.raw))
                async for chunk in response.aiter_raw():
                    await self._write(chunk)
        except httpx2.TransportError as error:
            if not is_stream:
                return  # nothing can be said inside another body: unfinished, it is closed with the connection
            cause = f"the connection broke after the answer had begun: {error}"
            await self._write(errors.replica_failed(model.name, cause).sse())
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, error: GatewayError) -> None:
        if self._headers_sent:
            await self._write(error.sse())
        else:
            await self._start(error.status, error.headers())
            await self._write(error.body())
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if not self._headers_sent:
            self._headers_sent = True
            self._status = status
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})


def _target(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return (raw.split(b"?", 1)[0] + (b"?" + query if query else b"")).decode("latin-1")


async def _respond(send: Send, status: int, body: bytes, content_type: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _respond_error(send: Send, error: GatewayError) -> None:
    await _respond(send, error.status, error.body(), b"application/json")
