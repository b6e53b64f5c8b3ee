"""`X-Request-Id`: the client's own name for a request, always honoured, and echoed where the configuration says so."""

import uuid
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER: Final = "X-Request-Id"
_RAW_NAME: Final = REQUEST_ID_HEADER.lower().encode()


class RequestIdEcho:
    """ASGI middleware that gives a request without an id one, and puts the id on the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = next((value for name, value in scope["headers"] if name == _RAW_NAME), b"")
        if not request_id:
            request_id = uuid.uuid4().hex.encode()
            scope = {**scope, "headers": [*scope["headers"], (_RAW_NAME, request_id)]}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id.decode("latin-1")
            await send(message)

        await self._app(scope, receive, send_with_id)
