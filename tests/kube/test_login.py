"""When credentials are read anew, and what a failure to read them does to those that still last."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from quire_kube.connection import Connection, ConnectionSettingsError, Endpoint, open_transport
from quire_kube.login import Login


class Reader:
    """Gives what it is told to, in this order; counts."""

    def __init__(self, *found: Connection | Exception) -> None:
        self._found = list(found)
        self.num_reads = 0

    async def __call__(self) -> Connection:
        self.num_reads += 1
        await asyncio.sleep(0)
        found = self._found.pop(0) if len(self._found) > 1 else self._found[0]
        if isinstance(found, Exception):
            raise found
        return found


def connection(token: str, lasts_s: float = 300.0, server: str = "http://a") -> Connection:
    return Connection(endpoint=Endpoint(server=server), authorization=token, lasts_s=lasts_s)


def play(reader: Reader, scenario: Callable[[Login], Awaitable[None]]) -> None:
    async def main() -> None:
        login = Login(reader)
        try:
            await scenario(login)
        finally:
            await login.close()

    asyncio.run(main())


def test_credentials_are_kept_while_they_last() -> None:
    reader = Reader(connection("a"))

    async def scenario(login: Login) -> None:
        assert await login.access() is await login.access()

    play(reader, scenario)
    assert reader.num_reads == 1


def test_those_that_have_lasted_are_read_anew_over_the_same_transport() -> None:
    async def scenario(login: Login) -> None:
        first = await login.access()
        second = await login.access()
        assert (first.connection.authorization, second.connection.authorization) == ("a", "b")
        assert first.transport is second.transport

    play(Reader(connection("a", lasts_s=-1.0), connection("b")), scenario)


def test_another_endpoint_has_a_transport_of_its_own() -> None:
    async def scenario(login: Login) -> None:
        first, second = await login.access(), await login.access()
        assert first.transport is not second.transport

    play(Reader(connection("a", -1.0), connection("a", server="http://b")), scenario)


def test_all_who_were_refused_at_once_read_once() -> None:
    """A plugin that takes a second is not run for each of eight workers."""
    reader = Reader(connection("a"), connection("b"))

    async def scenario(login: Login) -> None:
        refused = await login.access()
        found = await asyncio.gather(*(login.access(refused) for _ in range(8)))
        assert {access.connection.authorization for access in found} == {"b"}

    play(reader, scenario)
    assert reader.num_reads == 2


def test_a_failure_to_read_leaves_what_is_known_unless_it_was_refused() -> None:
    async def scenario(login: Login) -> None:
        known = await login.access()
        assert await login.access() is known
        with pytest.raises(ConnectionSettingsError):
            await login.access(refused=known)

    play(Reader(connection("a", -1.0), ConnectionSettingsError("no file")), scenario)


def test_a_certificate_that_cannot_be_used_is_a_fault_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    file.write_text("CERT")
    endpoint = Endpoint(server="https://a", cert_file=str(file), key_file=str(file))
    with pytest.raises(ConnectionSettingsError, match="certificates for https://a cannot be used"):
        open_transport(endpoint)
