"""Moving a listing's files into a model's directory: several at once, resumed, retried, verified.

Knows no protocol and no layout. Invariant: a file is finished only when its size and, where there is one, its checksum
are right and its bytes are on the disk; a file that is wrong twice ends the download.
"""

import logging
import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from quire_contract.units import format_bytes
from quire_server.download.errors import ChecksumMismatchError, DownloadError, SourceUnreachableError
from quire_server.download.progress import Meter
from quire_server.download.source import (
    CHUNK_BYTES,
    Hasher,
    InterruptedTransferError,
    Listing,
    RemoteFile,
    Source,
    StartOverError,
    start_hash,
)
from quire_server.download.volume import ModelDirectory, translated_errors

NUM_CONNECTIONS: Final = 4
_STRAGGLERS_S: Final = 2.0
_LONGEST_ASKED_PAUSE_S: Final = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a source that does not answer is asked again, in this process; the Job's own tries come on top."""

    give_up_after_s: float = 300.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0


DEFAULT_RETRY: Final = RetryPolicy()


class Retries:
    """The tries at one thing. Time is counted from the first failure after the last success."""

    def __init__(self, policy: RetryPolicy, meter: Meter, what: str, stop: threading.Event) -> None:
        self._policy = policy
        self._meter = meter
        self._what = what
        self._stop = stop
        self._num_failures = 0
        self._failing_since = 0.0

    def succeeded(self) -> None:
        if self._num_failures:
            self._num_failures = 0
            self._meter.say("")

    def pause(self, error: InterruptedTransferError) -> None:
        """Wait before the next try. Raises SourceUnreachableError when it has been long enough."""
        now = time.monotonic()
        if not self._num_failures:
            self._failing_since = now
        policy = self._policy
        pause_s = min(policy.longest_pause_s, policy.first_pause_s * 2**self._num_failures)
        pause_s = max(pause_s, min(error.retry_after_s or 0.0, _LONGEST_ASKED_PAUSE_S))
        self._num_failures += 1
        if now + pause_s - self._failing_since > policy.give_up_after_s:
            raise SourceUnreachableError(
                f"{self._what}: {error}; given up after {self._num_failures} tries.",
                hint="What has arrived is kept; the next try goes on from there. Check the network and the source.",
            ) from error
        self._meter.say(f"retrying in {pause_s:.0f} s: {error}")
        logger.warning("%s: %s; retrying in %.0f s", self._what, error, pause_s)
        self._stop.wait(pause_s)


def list_files(source: Source, what: str, meter: Meter, policy: RetryPolicy) -> Listing:
    """Ask the source for its files until it answers. Raises DownloadError."""
    retries = Retries(policy, meter, what, threading.Event())
    while True:
        try:
            return source.list_files()
        except InterruptedTransferError as error:
            retries.pause(error)


class Transfer:
    """Fetches files from one source into one directory, whose lock the caller holds."""

    def __init__(self, source: Source, directory: ModelDirectory, meter: Meter, policy: RetryPolicy) -> None:
        self._source = source
        self._directory = directory
        self._meter = meter
        self._policy = policy
        self._stop = threading.Event()

    def run(self, files: tuple[RemoteFile, ...]) -> None:
        """Fetch those that are not there yet. The first failure stops the others. Raises DownloadError."""
        missing = [file for file in files if not self._directory.is_whole(file)]
        pool = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="download")
        futures = [pool.submit(self._fetch, file) for file in missing]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            _raise_first(done)
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            wait(futures, timeout=_STRAGGLERS_S)

    def _fetch(self, file: RemoteFile) -> None:
        part = self._directory.part(file)
        for is_last in (False, True):
            found = self._receive(file, part)
            if self._stop.is_set():
                return
            if file.checksum is None or found == file.checksum.hex:
                with translated_errors(self._directory.volume):
                    self._directory.finish(file)
                logger.info("%s: %s, %s", file.name, format_bytes(file.size_bytes), _verdict(file))
                return
            part.unlink()
            self._meter.discard(file.size_bytes)
            logger.warning("%s: its %s is %s, not %s", file.name, file.checksum.kind, found, file.checksum.hex)
            if is_last:
                raise ChecksumMismatchError(
                    f"{file.name}: the {file.checksum.kind} checksum is {found}, but the source says "
                    f"{file.checksum.hex}; it was fetched twice.",
                    hint="Something on the way (a proxy, a mirror) or the source itself alters the file.",
                )

    def _receive(self, file: RemoteFile, part: Path) -> str:
        """Bring a part to its full size. Returns its checksum, empty where the source gives none to compare with."""
        retries = Retries(self._policy, self._meter, file.name, self._stop)
        with translated_errors(self._directory.volume), part.open("ab+") as target:
            if target.tell() > file.size_bytes:
                _empty(target)
            hasher = self._hash_present(file, target)
            while (size := target.tell()) < file.size_bytes and not self._stop.is_set():
                try:
                    self._append(file, target, hasher, retries)
                except StartOverError:
                    logger.info("%s cannot be continued at %s: starting over", file.name, format_bytes(size))
                    self._meter.discard(target.tell())
                    _empty(target)
                    hasher = start_hash(file)
                except InterruptedTransferError as error:
                    retries.pause(error)
            os.fsync(target.fileno())
        return hasher.hexdigest() if hasher else ""

    def _hash_present(self, file: RemoteFile, target: BinaryIO) -> Hasher | None:
        hasher = start_hash(file)
        target.seek(0)
        if hasher is not None:
            while (chunk := target.read(CHUNK_BYTES)) and not self._stop.is_set():
                hasher.update(chunk)
        target.seek(0, os.SEEK_END)
        return hasher

    def _append(self, file: RemoteFile, target: BinaryIO, hasher: Hasher | None, retries: Retries) -> None:
        """Read from the source until the file is whole or the download stops."""
        left = file.size_bytes - target.tell()
        for chunk in self._source.read(file, target.tell()):
            if self._stop.is_set():
                return
            if len(chunk) > left:
                raise DownloadError(f"{file.name} has changed at the source since its size was asked.")
            target.write(chunk)
            target.flush()
            if hasher is not None:
                hasher.update(chunk)
            self._meter.receive(len(chunk))
            left -= len(chunk)
            retries.succeeded()
        if left:
            raise InterruptedTransferError("the source stopped in the middle of the file")


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _raise_first(futures: set[Future[None]]) -> None:
    for future in futures:
        future.result()


def _verdict(file: RemoteFile) -> str:
    return f"{file.checksum.kind} verified" if file.checksum else "the source gives no checksum"
