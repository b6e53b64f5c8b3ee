"""Reading a request's body into its struct; what it holds besides is ignored aloud, or refused if so configured."""

from typing import TypeVar

import msgspec
from starlette.requests import Request

from quire_server.api.bodies.body import decode_body
from quire_server.api.bodies.lenient import LenientDecoder
from quire_server.api.state import get_frontend, get_ignored_fields
from quire_server.shared.errors import InvalidRequestError

T = TypeVar("T", bound=msgspec.Struct)


async def read_request(http_request: Request, decoder: LenientDecoder[T]) -> T:
    """Read and decode the body.

    Raises:
        InvalidRequestError: what `decode_body` raises, or the body has a field that this server does not know and is
            told to refuse.
        msgspec.DecodeError: it is not JSON, or (ValidationError) not what the struct says.
    """
    config = get_frontend(http_request).config
    body = await decode_body(http_request, decoder, config.max_request_body_bytes)
    if config.strict_fields:
        _refuse_unknown(body.unknown_fields)
    get_ignored_fields(http_request).note(http_request, body.unknown_fields)
    return body.value


def _refuse_unknown(names: tuple[str, ...]) -> None:
    """Refuse a field of the body itself. Inside it agents send back what another server gave them, as it was."""
    for name in names:
        if "." not in name:
            message = f"Unknown field `{name}`: leave it out, or start the server without --strict-fields."
            raise InvalidRequestError(message, param=name)
