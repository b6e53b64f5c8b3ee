"""The seam between where files come from and how they are fetched: a listing, and bytes from an offset.

A source decides which of its files make the model, says what is known of each, and turns its library's errors into
three: a `DownloadError` that another try would not change, an `InterruptedTransferError` that one may, and a
`StartOverError`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from quire_server.download.selection import check_name

CHUNK_BYTES: Final = 8 << 20
"""Read at once where the library asks per read; small enough for progress, large enough for the round trip."""


class InterruptedTransferError(Exception):
    """The source failed to answer, or stopped in the middle. The message says how, in a few words."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class StartOverError(Exception):
    """The file cannot be continued where it was left: it has changed, or the server knows no ranges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    """What the source says of a file's content. `git` is the identity of a blob in git."""

    kind: Literal["sha256", "md5", "git", "crc32c"]
    hex: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of the model. Raises ModelInvalidError where its name leads, or may lead, out of the model's directory."""

    name: str
    """Relative, with slashes; where the file goes below the model's directory."""
    size_bytes: int
    checksum: Checksum | None = None
    version: str | None = None
    """Changes with the content: an entity tag or a generation. None: not known."""

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def is_resumable(self) -> bool:
        """A mixture of two versions would be noticed."""
        return self.checksum is not None or self.version is not None

    @property
    def identity(self) -> str:
        """Name this content of this file, fit for a file name."""
        content = f"{self.checksum.kind}:{self.checksum.hex}" if self.checksum else self.version
        return hashlib.sha256(f"{self.name}\0{self.size_bytes}\0{content}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files that make the model, all of one revision."""

    files: tuple[RemoteFile, ...]
    revision: str | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class Source(Protocol):
    """Where a model's files come from. Used from several threads at once."""

    def list_files(self) -> Listing:
        """Raises DownloadError, InterruptedTransferError."""
        ...

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """Yield the file's bytes from `start` on. Raises as `list_files`, and StartOverError where start > 0."""
        ...


class Hasher(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def start_hash(file: RemoteFile) -> Hasher | None:
    """Return what computes the file's checksum; None where it has none."""
    if file.checksum is None:
        return None
    match file.checksum.kind:
        case "sha256":
            return hashlib.sha256()
        case "md5":
            return hashlib.md5(usedforsecurity=False)
        case "git":
            return hashlib.sha1(f"blob {file.size_bytes}\0".encode(), usedforsecurity=False)
        case "crc32c":
            return _Crc32c()


class _Crc32c:
    def __init__(self) -> None:
        import google_crc32c  # comes with gcsfs, whose files alone have such checksums

        self._checksum: Any = google_crc32c.Checksum()  # type: ignore[no-untyped-call]

    def update(self, data: bytes, /) -> None:
        self._checksum.update(data)

    def hexdigest(self) -> str:
        return bytes(self._checksum.digest()).hex()
