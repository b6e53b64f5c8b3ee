"""Reading a request's body: JSON of a bounded size, decoded straight into a struct."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from starlette.requests import Request

from quire_contract.nesting import NestingError, bounded_nesting
from quire_server.api.bodies.json_weight import LONG_BYTES, check_weight
from quire_server.shared.errors import InvalidRequestError, PayloadTooLargeError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class BodyDecoder(Protocol[T_co]):
    """Makes of JSON what handlers work with; msgspec's errors are its own."""

    def decode(self, body: bytes) -> T_co: ...


async def decode_body(request: Request, decoder: BodyDecoder[T], max_bytes: int) -> T:
    """Read and decode the body.

    Raises:
        InvalidRequestError: the content type is not JSON, there is no body, or it is not UTF-8.
        PayloadTooLargeError: it has more than `max_bytes`, or holds more values than so many bytes should.
        msgspec.DecodeError: it is not JSON, or (ValidationError) not what the struct says.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidRequestError(f"Content-Type must be application/json, got {content_type!r}.")
    body = await _read(request, max_bytes)
    if not body:
        raise InvalidRequestError("The request has no body.")
    await check_weight(body, max_bytes)
    try:
        with bounded_nesting(), _without_collections():
            decoded = decoder.decode(body)
    except NestingError as error:
        raise InvalidRequestError(f"The body cannot be read: {error}.") from None
    except UnicodeDecodeError as error:  # msgspec's own errors do not cover a text inside the JSON
        raise InvalidRequestError(f"The body is not valid UTF-8: {error.reason}.") from None
    if len(body) >= LONG_BYTES:
        await asyncio.sleep(0)  # what is made of many values takes as long again
    return decoded


@contextmanager
def _without_collections() -> Iterator[None]:
    """A collector that walks the values again and again as they come makes decoding many of them ten times slower."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def declared_bytes(request: Request) -> int | None:
    """Return how long the client says its body is; None where it does not say."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isascii() and declared.isdigit() else None


async def _read(request: Request, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = declared_bytes(request) or 0
    if size <= max_bytes:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                break
            chunks.append(chunk)
    if size > max_bytes:
        raise PayloadTooLargeError(f"The body is larger than the limit of {max_bytes} bytes.")
    return b"".join(chunks)
