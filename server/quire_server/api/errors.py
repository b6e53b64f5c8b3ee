"""How an exception becomes an HTTP answer: always OpenAI's body, with the status that the error's class names.

`EXCEPTION_HANDLERS` is the only place where a status is chosen for something that is not a `QuireError`.
"""

import math
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from quire_server.api.bodies.json_pieces import encode_in_pieces
from quire_server.api.openai.schemas.answers import ErrorInfo, ErrorResponse
from quire_server.api.sse import ClientDisconnectedError
from quire_server.shared.errors import AuthenticationError, InvalidRequestError, QuireError

CLIENT_CLOSED_REQUEST: Final = 499
"""Nginx's status for a client that left before the answer; nobody reads it but the access log."""

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_FIELD = re.compile(r"required field `([^`]+)`")
_INTERNAL_ERROR = ErrorInfo(
    message="Internal server error.", type="InternalServerError", code=HTTPStatus.INTERNAL_SERVER_ERROR
)


def build_error(error: QuireError) -> ErrorResponse:
    """Shape an error as OpenAI and vLLM do: `code` is vLLM's number, and what OpenAI writes there is `reason`."""
    info = ErrorInfo(message=str(error), type=error.type, param=error.param, code=int(error.status), reason=error.code)
    return ErrorResponse(error=info)


def build_validation_error(error: msgspec.ValidationError) -> InvalidRequestError:
    """Turn msgspec's complaint into ours: its `$.messages[0].role` becomes `param`."""
    message = str(error)
    path = _PATH.search(message)
    field = _FIELD.search(message)
    names = [match.group(1) for match in (path, field) if match and match.group(1) not in ("", "...")]
    return InvalidRequestError(_PATH.sub("", message) + _location(names), param=".".join(names) or None)


def _location(names: list[str]) -> str:
    return f" in `{'.'.join(names)}`." if names else "."


def json_response(content: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Encode a struct as the body of a response."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def long_json_response(content: msgspec.Struct) -> Response:
    """Encode a struct that may be long, in a thread that lets others run."""
    return Response(encode_in_pieces(content), media_type="application/json")


def error_response(error: QuireError) -> Response:
    """Answer a request with an error, and say when to come back where that is known."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(build_error(error), error.status, headers)


async def _on_quire_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QuireError)
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, msgspec.ValidationError)
    return error_response(build_validation_error(error))


async def _on_decode_error(request: Request, error: Exception) -> Response:
    return error_response(InvalidRequestError(f"The body is not valid JSON: {error}."))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "NotFoundError" if error.status_code == HTTPStatus.NOT_FOUND else "BadRequestError"
    message = f"{request.method} {request.url.path}: {error.detail}."
    body = ErrorResponse(error=ErrorInfo(message=message, type=kind, code=error.status_code))
    return json_response(body, error.status_code, dict(error.headers or {}))


async def _on_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # it left before the answer was begun


async def _on_bug(request: Request, error: Exception) -> Response:
    return json_response(ErrorResponse(error=_INTERNAL_ERROR), HTTPStatus.INTERNAL_SERVER_ERROR)


EXCEPTION_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    QuireError: _on_quire_error,
    msgspec.ValidationError: _on_validation_error,
    msgspec.DecodeError: _on_decode_error,
    HTTPException: _on_http_exception,
    ClientDisconnect: _on_client_disconnect,
    ClientDisconnectedError: _on_client_disconnect,
    Exception: _on_bug,
}
