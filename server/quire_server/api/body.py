"""Reading a request's body: JSON of a bounded size, decoded straight into a struct."""

from typing import Protocol, TypeVar

from starlette.requests import Request

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
        PayloadTooLargeError: it has more than `max_bytes`.
        msgspec.DecodeError: it is not JSON, or (ValidationError) not what the struct says.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidRequestError(f"Content-Type must be application/json, got {content_type!r}.")
    body = await _read(request, max_bytes)
    if not body:
        raise InvalidRequestError("The request has no body.")
    try:
        return decoder.decode(body)
    except UnicodeDecodeError as error:  # msgspec's own errors do not cover a text inside the JSON
        raise InvalidRequestError(f"The body is not valid UTF-8: {error.reason}.") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    chunks: list[bytes] = []
    size = int(declared) if declared.isascii() and declared.isdigit() else 0
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
