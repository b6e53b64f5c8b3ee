"""The HTTP session that kopf lists and watches through, with ears.

kopf hands single objects to its handlers, and neither the end of a listing, nor what a listing no longer has, nor
bookmarks. All of that passes through its session, so a middleware of the session reports it to `WatchState`. Changes
nothing of what passes. Knows no object's meaning.
"""

import time
from collections.abc import Callable
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp import ClientHandlerType, ClientMiddlewareType, ClientRequest, ClientResponse

from quire_kube.connection import Connection, open_transport
from quire_operator.watch.kopf_watch.watch_state import Page, WatchState

CountCall = Callable[[str, str, int], None]
"""Told of each answer: verb, plural of the kind (or the path), HTTP status."""


def build_session(connection: Connection, state: WatchState, count_call: CountCall) -> aiohttp.ClientSession:
    """Open a session to the API server that reports to `state`. The caller closes it."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=open_transport(connection.endpoint).ssl_context),
        headers=connection.headers(),
        proxy=connection.endpoint.proxy_url,
        middlewares=(_reporter(state, count_call),),
    )


def _reporter(state: WatchState, count_call: CountCall) -> ClientMiddlewareType:
    async def report(request: ClientRequest, send: ClientHandlerType) -> ClientResponse:
        response = await send(request)
        stream = state.stream_at(request.url.path)
        is_watch = request.url.query.get("watch") == "true"
        verb = "watch" if is_watch else "list" if stream else "get"
        count_call(verb, stream.kind.plural if stream else _short(request.url.path), response.status)
        if stream is None or response.status != 200:
            return response
        content = response.content
        state.saw_life(stream, time.monotonic(), (lambda: content.total_raw_bytes) if is_watch else None)
        if not is_watch:
            page = msgspec.json.decode(await response.read(), type=Page)  # kept: kopf reads it after us
            state.saw_page(stream, page, is_first="continue" not in request.url.query)
        return response

    return report


def _short(path: str) -> str:
    """Leave names out of a path, so that few different ones are counted."""
    return "/".join(urlsplit(path).path.split("/")[:4])
