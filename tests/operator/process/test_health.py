"""Liveness is judged; the endpoints say it."""

import asyncio
import contextlib
import socket

import aiohttp
import pytest

from quire_operator.process.health import (
    MAX_QUEUE_AGE_S,
    MAX_WATCH_AGE_S,
    Health,
    build_health_app,
    build_metrics_app,
    find_problem,
    serving,
)

OLD = MAX_WATCH_AGE_S + 1


@pytest.mark.parametrize(
    ("health", "problem"),
    [
        (Health(is_leader=False), None),
        (Health(is_leader=False, oldest_watch=("pods", OLD), queue_age_s=MAX_QUEUE_AGE_S + 1), None),
        (Health(is_leader=True), None),
        (Health(is_leader=True, oldest_watch=("pods", MAX_WATCH_AGE_S)), None),
        (Health(is_leader=True, oldest_watch=("pods", OLD)), "watch of pods"),
        (Health(is_leader=True, queue_age_s=MAX_QUEUE_AGE_S + 1), "queue"),
    ],
)
def test_find_problem(health: Health, problem: str | None) -> None:
    found = find_problem(health)
    assert (found is None) if problem is None else (found is not None and problem in found)


async def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}{path}") as response:
        return response.status, await response.text()


def test_endpoints_follow_the_health() -> None:
    async def scenario() -> None:
        health = Health(is_leader=False)
        async with serving(build_health_app(lambda: health), 0, "127.0.0.1") as port:
            assert await get(port, "/livez") == (200, "ok")
            assert await get(port, "/readyz") == (200, "standby")
            health = Health(is_leader=True)
            assert await get(port, "/readyz") == (200, "leader, reading the cluster")
            health = Health(is_leader=True, is_synced=True, oldest_watch=("jobs", OLD))
            assert await get(port, "/readyz") == (200, "leader")
            status, text = await get(port, "/livez")
            assert status == 503
            assert "the watch of jobs" in text

    asyncio.run(scenario())


def test_metrics_are_on_a_port_of_their_own() -> None:
    async def scenario() -> None:
        async with serving(build_metrics_app(lambda: b"up 1\n"), 0, "127.0.0.1") as port:
            assert await get(port, "/metrics") == (200, "up 1\n")
            assert (await get(port, "/livez"))[0] == 404

    asyncio.run(scenario())


def has_ipv6_loopback() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def test_a_free_port_is_the_same_one_in_both_families() -> None:
    async def scenario() -> None:
        async with serving(build_metrics_app(lambda: b"up 1\n"), 0) as port:
            assert await get(port, "/metrics") == (200, "up 1\n")
            if has_ipv6_loopback():
                assert await get(port, "/metrics", "[::1]") == (200, "up 1\n")

    asyncio.run(scenario())


def test_taken_port_is_an_error() -> None:
    async def scenario() -> None:
        async with serving(build_metrics_app(lambda: b""), 0, "127.0.0.1") as port:
            with pytest.raises(OSError, match="in use"):
                async with serving(build_metrics_app(lambda: b""), port, "127.0.0.1"):
                    pass

    asyncio.run(scenario())
