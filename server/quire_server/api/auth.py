"""Who may ask: bearer keys, compared in constant time. Probes, metrics and the description of the API stay open."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from quire_server.api.errors import error_response
from quire_server.shared.errors import AuthenticationError

PROTECTED_PATHS = ("/v1", "/tokenize", "/detokenize")


class BearerAuth:
    """ASGI middleware that refuses a protected path unless one of the keys is presented."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PROTECTED_PATHS) and not self._is_authorized(scope):
            await error_response(AuthenticationError("The API key is missing or wrong."))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_authorized(self, scope: Scope) -> bool:
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # every key, whichever matches
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
