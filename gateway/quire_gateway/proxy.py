"""One request to one replica: bytes forwarded as they are, another replica tried before the first byte of an answer."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx2

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
RETRIED_STATUSES = frozenset({500, 502, 504})
AWAY_STATUS = 503
"""What a replica answers that drains or still loads: another may take the request, or the same one later."""

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


class ReplicasAwayError(Exception):
    """No replica takes the request now, though the model has some: they drain, restart, or are gone already."""

    def __init__(self, cause: str, num_broken: int) -> None:
        super().__init__(cause)
        self.num_broken = num_broken
        """How many had the request, and broke the connection before they answered."""


class Proxy:
    """Sends requests to replicas, the one with the fewest in flight first."""

    def __init__(self, client: httpx2.AsyncClient | None = None) -> None:
        # No limit and no read timeout: the servers bound their own queues, and a prompt may take minutes.
        self._client = client or httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=5.0),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256),
            trust_env=False,
        )
        self._in_flight: Counter[Backend] = Counter()

    async def aclose(self) -> None:
        await self._client.aclose()

    def in_flight(self, backend: Backend) -> int:
        return self._in_flight[backend]

    @asynccontextmanager
    async def send(
        self, model: Model, request: UpstreamRequest, *, must_answer: bool
    ) -> AsyncIterator[httpx2.Response]:
        """Open a response whose body has not been read; closing the context closes the upstream connection.

        A replica that refuses the connection or fails is passed over for another, `MAX_RETRIES` times; one that drains
        or loads is none of these.

        Args:
            must_answer: the last replica's answer is given, whatever it is.

        Raises:
            ReplicasAwayError: no replica could take it, and all may soon; not with `must_answer`.
            GatewayError: no replica could be reached, with `must_answer`.
        """
        cause = "none is ready"
        num_failures = num_broken = 0
        tried: set[Backend] = set()
        while num_failures <= MAX_RETRIES and (left := [each for each in model.backends if each not in tried]):
            backend = min(left, key=self.in_flight)
            tried.add(backend)
            async with self._counted(backend), AsyncExitStack() as opened:
                try:
                    response = await self._client.send(self._build(backend, request), stream=True)
                except httpx2.TransportError as error:
                    cause = f"{backend.host}:{backend.port}: {error or type(error).__name__}"
                    num_failures += 1
                    num_broken += not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                    continue
                opened.push_async_callback(response.aclose)
                is_away = response.status_code == AWAY_STATUS
                num_failures += response.status_code in RETRIED_STATUSES
                is_last = len(left) == 1 or num_failures > MAX_RETRIES
                if (is_away or response.status_code in RETRIED_STATUSES) and not (
                    is_last and (must_answer or not is_away)
                ):
                    cause = f"{backend.host}:{backend.port} answered {response.status_code}"
                    continue
                yield response
                return
        if must_answer:
            raise errors.replica_failed(model.name, cause)
        raise ReplicasAwayError(cause, num_broken)

    @asynccontextmanager
    async def _counted(self, backend: Backend) -> AsyncIterator[None]:
        self._in_flight[backend] += 1
        try:
            yield
        finally:
            self._in_flight[backend] -= 1
            if not self._in_flight[backend]:
                del self._in_flight[backend]  # replicas come and go

    def _build(self, backend: Backend, request: UpstreamRequest) -> httpx2.Request:
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
