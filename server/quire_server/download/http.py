"""Files over HTTP: bytes from an offset, for every source that is reached so, and the source that is one URL.

The version of a file is its strong entity tag, or its date; a range is only continued while that is the same.
"""

import base64
import binascii
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import httpx2

from quire_contract.model_uri import ModelUri
from quire_server.download.errors import DownloadError, ModelGatedError, ModelInvalidError, SourceNotFoundError
from quire_server.download.source import (
    Checksum,
    InterruptedTransferError,
    Listing,
    RemoteFile,
    StartOverError,
)

TIMEOUT: Final = httpx2.Timeout(30.0, connect=10.0, pool=None)
_WORTH_ANOTHER_TRY: Final = (408, 425, 429)


def read_range(
    client: httpx2.Client,
    url: str,
    *,
    headers: dict[str, str],
    start: int,
    validator: str | None = None,
    check: Callable[[httpx2.Response], None],
) -> Iterator[bytes]:
    """Yield the bytes of a URL from `start` on. `check` raises what the status of an answer means.

    Raises:
        StartOverError: the server gave no such range, or the file is no longer what `validator` says.
        InterruptedTransferError: no answer, or not all of it.
    """
    headers = {**headers, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator is not None:
            headers["If-Range"] = validator
    with interruptions(), client.stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if start and (response.status_code in (200, 416) or not _starts_at(response, start)):
            raise StartOverError
        if response.is_error:
            response.read()
        check(response)
        yield from response.iter_raw()


def _starts_at(response: httpx2.Response, start: int) -> bool:
    return response.status_code != 206 or response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


@contextmanager
def interruptions() -> Iterator[None]:
    """Turn the HTTP library's failures into InterruptedTransferError."""
    try:
        yield
    except httpx2.RequestError as error:
        raise InterruptedTransferError(str(error) or type(error).__name__) from error
    except httpx2.InvalidURL as error:
        raise DownloadError(f"Not a URL: {error}.", hint="Check spec.model.uri and the endpoint.") from error


def check_worth_another_try(response: httpx2.Response) -> None:
    """Raise InterruptedTransferError for a status that may be another one later."""
    if response.status_code >= 500 or response.status_code in _WORTH_ANOTHER_TRY:
        after = response.headers.get("Retry-After", "")
        raise InterruptedTransferError(
            f"{response.url.host} answered {response.status_code} {response.reason_phrase}".rstrip(),
            retry_after_s=float(after) if after.isdigit() else None,
        )


class HttpSource:
    """One GGUF file at a URL. `token` is sent as a bearer token, to that host alone."""

    def __init__(self, uri: ModelUri, token: str | None) -> None:
        self._url = str(uri)
        self._shown = uri.shown
        self._name = uri.last_part
        self._headers = {"User-Agent": "quire"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._has_token = bool(token)
        self._client = httpx2.Client(follow_redirects=True)
        if not self._name.endswith(".gguf"):
            raise ModelInvalidError(
                f"{self._shown}: over HTTP a model is one .gguf file; this URL names none.",
                hint="Put a model of several files on the Hub or in a bucket (hf://, s3://, gs://).",
            )

    def list_files(self) -> Listing:
        """Ask for one byte: unlike HEAD, that works with signed URLs, and tells whether ranges do."""
        headers = {**self._headers, "Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with interruptions(), self._client.stream("GET", self._url, headers=headers, timeout=TIMEOUT) as response:
            self._check(response)
            size = _full_size(response)
            if size is None:
                raise DownloadError(f"{self._shown}: the server does not say how long the file is.")
            version = _validator(response) if response.status_code == 206 else None
            checksum = next(filter(None, map(_sha256, [response, *response.history])), None)
        file = RemoteFile(name=self._name, size_bytes=size, checksum=checksum, version=version)
        return Listing(files=(file,), revision=version.strip('"') if version else None)

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        return read_range(
            self._client, self._url, headers=self._headers, start=start, validator=file.version, check=self._check
        )

    def _check(self, response: httpx2.Response) -> None:
        check_worth_another_try(response)
        status = response.status_code
        if status in (401, 403):
            given = "refused the token it was given" if self._has_token else "asks for a token, and none was given"
            raise ModelGatedError(
                f"{self._shown}: the server {given} ({status}).",
                hint="Set spec.model.tokenSecretRef to a Secret with a token that may read the file.",
            )
        if status in (404, 410):
            raise SourceNotFoundError(f"{self._shown} does not exist ({status}).", hint="Check spec.model.uri.")
        if not response.is_success:
            raise DownloadError(f"{self._shown}: the server answered {status} {response.reason_phrase}.")


def _full_size(response: httpx2.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        text = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isdigit() else None


def _validator(response: httpx2.Response) -> str | None:
    tag: str = response.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        return tag
    date: str | None = response.headers.get("Last-Modified")
    return date


def _sha256(response: httpx2.Response) -> Checksum | None:
    """Return the checksum of the whole file, if one of the usual headers has it."""
    linked = response.headers.get("X-Linked-ETag", "").strip('"')
    if len(linked) == 64 and all(c in "0123456789abcdef" for c in linked):
        return Checksum(kind="sha256", hex=linked)
    candidates = [response.headers.get("x-amz-checksum-sha256", "")]
    for header in ("Repr-Digest", "Digest"):
        for entry in response.headers.get(header, "").split(","):
            kind, _, value = entry.strip().partition("=")
            if kind.lower() == "sha-256":
                candidates.append(value.strip(":"))
    for candidate in candidates:
        digest = decode_base64(candidate)
        if digest is not None and len(digest) == 32:
            return Checksum(kind="sha256", hex=digest.hex())
    return None


def decode_base64(text: str) -> bytes | None:
    """Decode base64; None where the text is something else (S3 appends the number of parts to a composite one)."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
