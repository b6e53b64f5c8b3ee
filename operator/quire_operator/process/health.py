"""The operator's HTTP endpoints: is the process alive, is it ready, what does it count.

Liveness is a pure judgement of a `Health`; the app answers from it. A process that only waits for the lease is alive
and ready. Knows no watch and no queue.
"""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from quire_contract import paths

MAX_WATCH_AGE_S: Final = 600.0
"""A watch shows life at least every few minutes: bookmarks, or a new request when the old one has timed out."""
MAX_QUEUE_AGE_S: Final = 600.0
"""Longer than any reconcile takes, its waits for an unresponsive API server included."""
_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How the process is, at one moment."""

    is_leader: bool
    is_synced: bool = False
    """Whether, as leader, it has seen everything there is."""
    oldest_watch: tuple[str, float] | None = None
    """The watch that has shown no life for longest, and for how many seconds."""
    queue_age_s: float = 0.0


def find_problem(health: Health) -> str | None:
    """Return why the process should be restarted, or None."""
    if not health.is_leader:
        return None
    if health.oldest_watch is not None and health.oldest_watch[1] > MAX_WATCH_AGE_S:
        kind, age_s = health.oldest_watch
        return f"the watch of {kind} has shown no life for {age_s:.0f} s"
    if health.queue_age_s > MAX_QUEUE_AGE_S:
        return f"the oldest key has been in the queue for {health.queue_age_s:.0f} s"
    return None


def build_health_app(read: Callable[[], Health]) -> web.Application:
    """Return the app with /livez and /readyz."""

    async def livez(_: web.Request) -> web.Response:
        problem = find_problem(read())
        return web.Response(text=problem or "ok", status=200 if problem is None else 503)

    async def readyz(_: web.Request) -> web.Response:
        health = read()
        if not health.is_leader:
            return web.Response(text="standby")
        return web.Response(text="leader" if health.is_synced else "leader, reading the cluster")

    app = web.Application()
    app.add_routes([web.get(paths.LIVEZ, livez), web.get(paths.READYZ, readyz)])
    return app


def build_metrics_app(render: Callable[[], bytes]) -> web.Application:
    """Return the app with /metrics."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=render(), headers={"Content-Type": _METRICS_TYPE})

    app = web.Application()
    app.add_routes([web.get(paths.METRICS, metrics)])
    return app


@asynccontextmanager
async def serving(app: web.Application, port: int, host: str | None = None) -> AsyncIterator[int]:
    """Serve an app while the block runs, on all addresses unless told; yields the port (a free one, if that was 0).

    Raises:
        OSError: the port is taken.
    """
    with _listen(host, port) as listener:
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            yield listener.getsockname()[1]
        finally:
            await runner.cleanup()


def _listen(host: str | None, port: int) -> socket.socket:
    """One socket for both families: of two, each would have a free port of its own."""
    if host is None and socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server((host or "", port))
