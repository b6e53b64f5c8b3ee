"""Credentials as they are now, and the transport that goes with them.

Read again when they have lasted, and at once when they were refused; by one of those who wait, for all. A failure to
read them is no failure of those that still last. Knows no request.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kubernetes.aio.client.rest import RESTClientObject

from quire_kube.connection import Connection, ConnectionSettingsError, open_transport

logger = logging.getLogger(__name__)

Connect = Callable[[], Awaitable[Connection]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Access:
    """A connection, since when it is known, and the transport to its endpoint."""

    connection: Connection
    transport: RESTClientObject
    since: float

    @property
    def has_lasted(self) -> bool:
        return time.monotonic() - self.since > self.connection.lasts_s


class Login:
    """Keeps the access to one API server.

    Args:
        connect: reads the credentials as they are now.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._access: Access | None = None
        self._previous: RESTClientObject | None = None
        self._reading = asyncio.Lock()

    async def access(self, refused: Access | None = None) -> Access:
        """Return credentials that still last, and not those that were refused.

        Raises:
            ConnectionSettingsError: there are none.
        """
        async with self._reading:
            known = self._access
            if known is not None and known is not refused and not known.has_lasted:
                return known
            try:
                self._access = await self._read(known)
            except ConnectionSettingsError as error:
                if known is None or known is refused:
                    raise
                logger.warning("Credentials cannot be read anew, the old ones stay err=%s", error)
                return known
            return self._access

    async def close(self) -> None:
        transports = (self._previous, self._access.transport if self._access is not None else None)
        self._access = self._previous = None
        for transport in transports:
            if transport is not None:
                await transport.close()

    async def _read(self, known: Access | None) -> Access:
        connection = await self._connect()
        now = time.monotonic()
        if known is not None and known.connection.endpoint == connection.endpoint:
            return Access(connection=connection, transport=known.transport, since=now)
        transport = open_transport(connection.endpoint)
        # The one before may still be used by requests under way; the one before that cannot any more.
        if self._previous is not None:
            await self._previous.close()
        self._previous = known.transport if known is not None else None
        return Access(connection=connection, transport=transport, since=now)
