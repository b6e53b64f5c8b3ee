"""The HTTP session that kopf lists and watches through, with ears.

kopf hands single objects to its handlers, and neither the end of a listing, nor what a listing no longer has, nor
bookmarks. All of that passes through its session, so the session reports it to `WatchState`. Changes nothing of what
passes. Knows no object's meaning.
"""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.client_reqrep import ClientResponse
from multidict import MultiMapping

from quire_kube.connection import Connection, open_transport
from quire_operator.watch.watch_state import Stream, WatchState

CountCall = Callable[[str, str, int], None]
"""Told of each answer: verb, plural of the kind (or the path), HTTP status."""


def build_session(connection: Connection, state: WatchState, count_call: CountCall) -> aiohttp.ClientSession:
    """Open a session to the API server that reports to `state`. The caller closes it."""

    class Response(_ReportingResponse):
        _state = state
        _count_call = staticmethod(count_call)

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=open_transport(connection.endpoint).ssl_context),
        headers=connection.headers(),
        proxy=connection.endpoint.proxy_url,
        response_class=Response,
    )


class _ReportingResponse(ClientResponse):
    """Reports pages of listings as they are parsed, and each chunk of a watch."""

    _state: WatchState
    _count_call: CountCall

    async def start(self, connection: Any) -> ClientResponse:
        response = await super().start(connection)
        stream = self._stream()
        is_watch = _is_watch(self.url.query)
        verb = "watch" if is_watch else "list" if stream else "get"
        self._count_call(verb, stream.kind.plural if stream else _short(self.url.path), self.status)
        if stream is not None and self.status == 200:
            self._state.saw_life(stream, time.monotonic())
            if is_watch:
                self.content = _ReportingReader(self.content, self._state, stream)  # type: ignore[assignment]
        return response

    async def json(self, **kwargs: Any) -> Any:
        page = await super().json(**kwargs)
        stream = self._stream()
        if stream is not None and self.status == 200 and not _is_watch(self.url.query):
            self._state.saw_page(stream, page, is_first="continue" not in self.url.query)
        return page

    def _stream(self) -> Stream | None:
        return self._state.stream_at(self.url.path)


class _ReportingReader:
    """A body's reader that reports each chunk; all else is the reader's own."""

    def __init__(self, reader: aiohttp.StreamReader, state: WatchState, stream: Stream) -> None:
        self._reader = reader
        self._state = state
        self._stream = stream

    async def iter_chunked(self, num_bytes: int) -> AsyncIterator[bytes]:
        async for chunk in self._reader.iter_chunked(num_bytes):
            self._state.saw_life(self._stream, time.monotonic())
            yield chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def _is_watch(query: MultiMapping[str]) -> bool:
    return query.get("watch") == "true"


def _short(path: str) -> str:
    """Leave names out of a path, so that few different ones are counted."""
    return "/".join(urlsplit(path).path.split("/")[:4])
