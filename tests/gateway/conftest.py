"""A raw ASGI driver, so that tests see what a client sees byte by byte, and can hang up."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from quire_gateway.app import Gateway
from quire_gateway.backends import Backend, Model, StaticBackends
from quire_gateway.proxy import Proxy

Handler = Callable[[httpx2.Request], Any]


class Exchange:
    """One request to the gateway, in flight."""

    def __init__(self, gateway: Gateway, method: str, path: str, body: bytes, host: str) -> None:
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outgoing: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", host.encode()), (b"content-type", b"application/json")],
        }
        self.task = asyncio.ensure_future(gateway(scope, self._incoming.get, self._outgoing.put))
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_open = True
        """The end of the body has not been read."""

    @property
    def has_begun(self) -> bool:
        """Something was answered that has not been read."""
        return not self._outgoing.empty()

    async def next(self) -> bytes:
        """The next piece of the body, after the head; b"" at the end."""
        async with asyncio.timeout(5):
            message = await self._outgoing.get()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            return await self.next()
        body: bytes = message["body"]
        self.is_open = message["more_body"]
        return body

    async def rest(self) -> bytes:
        body = b""
        async with asyncio.timeout(5):
            await self.task
        while not self._outgoing.empty():
            body += await self.next()
        return body

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})


class World:
    """A gateway with one model, `default/tiny`, whose replicas are functions."""

    def __init__(self, handler: Handler, *, away_patience_s: float = 5.0, **fields: Any) -> None:
        self.backends = StaticBackends()
        self.seen: list[httpx2.Request] = []
        self.handler = handler

        def record(request: httpx2.Request) -> Any:
            self.seen.append(request)
            return self.handler(request)

        client = httpx2.AsyncClient(transport=httpx2.MockTransport(record))
        self.gateway = Gateway(self.backends, proxy=Proxy(client), away_patience_s=away_patience_s)
        self.model = Model(
            **{
                "namespace": "default",
                "name": "tiny",
                "served_names": ("tiny", "alias"),
                "status": "no replica",
                **fields,
            }
        )
        self.backends.set(self.model)

    def set(self, **changes: Any) -> None:
        import dataclasses

        self.model = dataclasses.replace(self.model, **changes)
        self.backends.set(self.model)

    def ready(self, count: int = 1) -> None:
        self.set(backends=tuple(Backend(host="replica", port=port + 1) for port in range(count)))

    def chat(self, *, stream: bool = False, model: str = "tiny", host: str = "localhost:8080") -> Exchange:
        body = json.dumps({"model": model, "stream": stream, "messages": []}).encode()
        return Exchange(self.gateway, "POST", "/v1/chat/completions", body, host)

    def get(self, path: str) -> Exchange:
        return Exchange(self.gateway, "GET", path, b"", "localhost")


@pytest.fixture
def world() -> type[World]:
    return World


@pytest.fixture
def exchange() -> type[Exchange]:
    return Exchange
