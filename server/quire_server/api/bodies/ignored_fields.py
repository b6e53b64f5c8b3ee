"""Fields of requests that were ignored: named in a header of the answer, counted, and logged when first seen.

Everything here is bounded, because a client chooses the names: `lenient` bounds those of one body; the metric counts a
name of its own for those that are known, and `other` for the rest; the log forgets to speak once it has said enough.
"""

import logging
from collections.abc import Collection
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire_contract.metrics import OTHER_FIELD
from quire_server.frontend.metrics import ServerMetrics

log = logging.getLogger(__name__)

IGNORED_FIELDS_HEADER: Final = "X-Quire-Ignored-Fields"
MAX_LOGGED_NAMES: Final = 256
_SCOPE_KEY: Final = "quire.ignored_fields"


class IgnoredFields:
    """What one server has ignored so far."""

    def __init__(self, metrics: ServerMetrics, known: Collection[str]) -> None:
        self._metrics = metrics
        self._known = known
        self._logged: set[str] = set()

    def note(self, request: Request, names: Collection[str]) -> None:
        """Count the ignored fields of one request, and have its answer name them."""
        if not names:
            return
        request.scope[_SCOPE_KEY].extend(names)
        for name in names:
            self._metrics.count_ignored_field(name if name in self._known else OTHER_FIELD)
        first_seen = sorted(set(names) - self._logged)[: MAX_LOGGED_NAMES - len(self._logged)]
        if first_seen:
            self._logged.update(first_seen)
            log.warning(
                "Ignored fields of a request that this server does not know: path=%s fields=%s (said once for each)",
                request.url.path,
                ",".join(first_seen),
            )


class IgnoredFieldsHeader:
    """ASGI middleware that puts the names of ignored fields on the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names: list[str] = []

        async def send_with_names(message: Message) -> None:
            if names and message["type"] == "http.response.start":
                MutableHeaders(scope=message)[IGNORED_FIELDS_HEADER] = ", ".join(names)
            await send(message)

        await self._app({**scope, _SCOPE_KEY: names}, receive, send_with_names)
