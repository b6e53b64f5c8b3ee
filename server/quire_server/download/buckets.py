"""Objects below a prefix of an S3 or Google Cloud Storage bucket as a source, through fsspec's file systems.

Credentials and endpoints are what those libraries read: the environment, files, the node's or the pod's identity.
How to connect, and what is known of an object, is all that the two kinds differ in.
"""

import base64
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fsspec import AbstractFileSystem

from quire_contract.model_uri import ModelUri
from quire_server.download.errors import DownloadError, ModelGatedError, SourceNotFoundError
from quire_server.download.http import decode_base64
from quire_server.download.selection import choose_files, is_part
from quire_server.download.source import (
    CHUNK_BYTES,
    Checksum,
    InterruptedTransferError,
    Listing,
    RemoteFile,
)

_FRESH = {"use_listings_cache": False, "skip_instance_cache": True}


class BucketSource(ABC):
    """A bucket's prefix, or a single object."""

    credentials: str
    """Which secrets open it, for a person."""

    def __init__(self, uri: ModelUri) -> None:
        self._uri = uri
        self._root = f"{uri.authority}/{uri.path}".rstrip("/")
        self._fs = self.connect()

    @abstractmethod
    def connect(self) -> AbstractFileSystem: ...

    @abstractmethod
    def describe(self, path: str, entry: Mapping[str, Any]) -> tuple[Checksum | None, str | None]:
        """Return an object's checksum and version. `entry` is what the listing says of it."""

    def list_files(self) -> Listing:
        with self._translated():
            entries = self._find()
            objects = {path: entry for path, entry in entries.items() if entry["type"] == "file"}
            names = {self._name(path): path for path in objects if not path.endswith("/")}
            if not names:
                raise SourceNotFoundError(f"{self._uri}: there is nothing.", hint="Check spec.model.uri.")
            chosen = choose_files(str(self._uri), names, self._address)
            files = tuple(self._remote_file(name, names[name], objects[names[name]]) for name in chosen)
        return Listing(files=files, revision=files[0].version if len(files) == 1 else None)

    def _address(self, parts: Sequence[str]) -> str | None:
        return None if is_part(parts[0]) else f"{self._uri}/{parts[0]}"

    def _find(self) -> dict[str, dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
        return entries

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        path = self._root if self._root.endswith("/" + file.name) else f"{self._root}/{file.name}"
        with self._translated(), self._fs.open(path, "rb", block_size=CHUNK_BYTES, cache_type="none") as source:
            if file.version is not None and self._version(source.details) != file.version:
                raise DownloadError(f"{self._uri}: {file.name} has changed since it was listed.")
            source.seek(start)
            while chunk := source.read(CHUNK_BYTES):
                yield chunk

    def _name(self, path: str) -> str:
        return path.removeprefix(self._root + "/") if path != self._root else path.rpartition("/")[2]

    def _remote_file(self, name: str, path: str, entry: Mapping[str, Any]) -> RemoteFile:
        checksum, version = self.describe(path, entry)
        return RemoteFile(name=name, size_bytes=entry["size"], checksum=checksum, version=version)

    @staticmethod
    def _version(entry: Mapping[str, Any]) -> str | None:
        version = entry.get("generation") or entry.get("ETag") or entry.get("etag")
        return str(version).strip('"') if version else None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the libraries' errors into ours."""
        unanswered: tuple[type[Exception], ...] = (OSError, *self.library_errors())
        try:
            yield
        except FileNotFoundError as error:
            raise SourceNotFoundError(
                f"{self._uri}: no such bucket or object.", hint="Check spec.model.uri and the endpoint."
            ) from error
        except unanswered as error:
            if self.is_refusal(error):
                reason = str(error).partition("\n")[0][:200].rstrip(".")
                raise ModelGatedError(
                    f"{self._uri}: access denied ({reason}).", hint=f"Give the download {self.credentials}."
                ) from error
            raise InterruptedTransferError(f"{type(error).__name__}: {str(error)[:200]}") from error

    def is_refusal(self, error: Exception) -> bool:
        """Whether an error means that this client may not read the bucket."""
        return isinstance(error, PermissionError)

    def library_errors(self) -> tuple[type[Exception], ...]:
        """Return what the client raises, besides OSError, when it is not answered."""
        import aiohttp

        return (aiohttp.ClientError,)


class S3Source(BucketSource):
    """$AWS_ENDPOINT_URL names another server that speaks S3. Without credentials, public objects are read."""

    credentials = (
        "credentials that may list and read the bucket: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role of the "
        "pod or node"
    )

    def connect(self, *, is_anonymous: bool = False) -> AbstractFileSystem:
        from s3fs import S3FileSystem

        return S3FileSystem(anon=is_anonymous, **_FRESH)

    def _find(self) -> dict[str, dict[str, Any]]:
        from botocore.exceptions import NoCredentialsError

        try:
            return super()._find()
        except NoCredentialsError:
            self._fs = self.connect(is_anonymous=True)
            return super()._find()

    def describe(self, path: str, entry: Mapping[str, Any]) -> tuple[Checksum | None, str | None]:
        bucket, _, key = path.partition("/")
        head = self._fs.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        version = self._version(head)
        if head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            digest = decode_base64(head.get("ChecksumSHA256", ""))
            if digest:
                return Checksum(kind="sha256", hex=digest.hex()), version
        is_md5 = version is not None and len(version) == 32 and head.get("ServerSideEncryption") in (None, "AES256")
        if is_md5 and "SSECustomerAlgorithm" not in head:
            assert version is not None
            return Checksum(kind="md5", hex=version), version
        return None, version

    def library_errors(self) -> tuple[type[Exception], ...]:
        from botocore.exceptions import BotoCoreError

        return (*super().library_errors(), BotoCoreError)


class GcsSource(BucketSource):
    """$STORAGE_EMULATOR_HOST names another server that speaks its JSON API."""

    credentials = "credentials that may list and read the bucket: GOOGLE_APPLICATION_CREDENTIALS, or workload identity"

    def connect(self) -> AbstractFileSystem:
        from gcsfs.core import GCSFileSystem  # without the gRPC client for buckets with folders

        return GCSFileSystem(**_FRESH)

    def describe(self, path: str, entry: Mapping[str, Any]) -> tuple[Checksum | None, str | None]:
        version = self._version(entry)
        for key, kind in (("md5Hash", "md5"), ("crc32c", "crc32c")):
            if entry.get(key):
                return Checksum(kind=kind, hex=base64.b64decode(entry[key]).hex()), version  # type: ignore[arg-type]
        return None, version

    def library_errors(self) -> tuple[type[Exception], ...]:
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError

        return (*super().library_errors(), HttpError, GoogleAuthError)

    def is_refusal(self, error: Exception) -> bool:
        from gcsfs.retry import HttpError

        if isinstance(error, HttpError):
            return error.code in (401, 403)
        return super().is_refusal(error) or str(error).startswith("Forbidden")
