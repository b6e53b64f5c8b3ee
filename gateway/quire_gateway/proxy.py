"""One request to one replica: bytes forwarded as they are, another replica tried before the first byte of an answer."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from quire_gateway import errors
from quire_gateway.backends import Backend, Model

MAX_RETRIES = 2
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
RETRIED_STATUSES = frozenset({500, 502, 503, 504})

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamRequest:
    """What the client sent, ready to be sent again."""

    method: str
    target: str
    """Path and query, as received."""
    headers: Headers
    body: bytes


def end_to_end(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Headers that a proxy passes on (RFC 9110 §7.6.1)."""
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]


class Proxy:
    """Sends requests to replicas, the one with the fewest in flight first."""

    def __init__(self, client: httpx.AsyncClient | None = None) -> None:
        # No limit and no read timeout: the servers bound their own queues, and a prompt may take minutes.
        self._client = client or httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            trust_env=False,
        )
        self._in_flight: Counter[Backend] = Counter()

    async def aclose(self) -> None:
        await self._client.aclose()

    def in_flight(self, backend: Backend) -> int:
        return self._in_flight[backend]

    @asynccontextmanager
    async def send(self, model: Model, request: UpstreamRequest) -> AsyncIterator[httpx.Response]:
        """Open a response whose body has not been read; closing the context closes the upstream connection.

        Raises:
            GatewayError: no replica could be reached.
        """
        tried: set[Backend] = set()
        cause = "none is ready"
        for attempt in range(MAX_RETRIES + 1):
            candidates = [b for b in model.backends if b not in tried]
            if not candidates:
                break
            backend = min(candidates, key=self.in_flight)
            tried.add(backend)
            is_last = attempt == MAX_RETRIES or len(candidates) == 1
            self._in_flight[backend] += 1
            try:
                try:
                    response = await self._client.send(self._build(backend, request), stream=True)
                except httpx.TransportError as error:
                    cause = f"{backend.host}:{backend.port}: {error or type(error).__name__}"
                    continue
                try:
                    if response.status_code in RETRIED_STATUSES and not is_last:
                        cause = f"{backend.host}:{backend.port} answered {response.status_code}"
                        continue
                    yield response
                    return
                finally:
                    await response.aclose()
            finally:
                self._in_flight[backend] -= 1
                if not self._in_flight[backend]:
                    del self._in_flight[backend]  # replicas come and go
        raise errors.replica_failed(model.name, cause)

    def _build(self, backend: Backend, request: UpstreamRequest) -> httpx.Request:
        headers = [
            (name, value)
            for name, value in end_to_end(request.headers)
            if name.lower() not in (b"host", b"content-length", b"accept-encoding")
        ]
        return self._client.build_request(
            request.method,
            f"{backend.url}{request.target}",
            headers=[*headers, (b"accept-encoding", b"identity")],
            content=request.body,
        )
