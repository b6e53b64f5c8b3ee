"""A model's place in a volume: what is there, what is on its way, the lock, and the step that makes it complete.

    <directory>/<key>/                    the model; there is a `.complete` marker in it, or it is not complete
    <directory>/.<key>.partial/model/     files that are whole and verified, moved to <key> in one rename
    <directory>/.<key>.partial/parts/     files that are not: named after their content, so that another version of a
                                          file never continues this one; and a note for each that is
    <directory>/.<key>.lock               held with flock by whoever writes either of the above; never removed, because
                                          a waiting process may hold it open

Invariants: only the holder of the lock writes; whatever a process is killed in, the next one goes on from there.
Knows no source. A filesystem without flock is refused: two writers would spoil each other's files.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from quire_contract.model_facts import ModelFacts, decode_facts, encode_facts
from quire_contract.paths import COMPLETE_MARKER
from quire_contract.units import format_bytes
from quire_server.download.errors import DownloadError, NoSpaceError
from quire_server.download.source import RemoteFile

RESERVE_BYTES: Final = 32 << 20
"""Left free, for the filesystem's own records."""
_LOCK_PERIOD_S: Final = 0.5


class ModelDirectory:
    """One model's place in one volume."""

    def __init__(self, volume: Path, key: str) -> None:
        self.path = volume / key
        self.volume = volume
        self._partial = volume / f".{key}.partial"
        self._lock = volume / f".{key}.lock"
        self._parts = self._partial / "parts"
        self.staging = self._partial / "model"

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock. `on_wait` is called if another process has it. Raises DownloadError."""
        with translated_errors(self.volume):
            self.volume.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)
        try:
            if not self._try_lock(descriptor):
                on_wait()
                while not self._try_lock(descriptor):
                    time.sleep(_LOCK_PERIOD_S)
            yield
        finally:
            os.close(descriptor)

    def _try_lock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise DownloadError(
                f"{self.volume}: the volume's filesystem has no file locks ({error.strerror}).",
                hint="Mount NFS with version 4, or with a lock daemon; other volumes need a filesystem with flock.",
            ) from error
        return True

    def is_marked(self) -> bool:
        return (self.path / COMPLETE_MARKER).is_file()

    def read_facts(self) -> ModelFacts | None:
        """Return what the marker holds; None where it is empty or of another version."""
        return decode_facts((self.path / COMPLETE_MARKER).read_bytes())

    def write_facts(self, facts: ModelFacts, directory: Path) -> None:
        """Write the marker, in one step."""
        with translated_errors(self.volume):
            draft = directory / (COMPLETE_MARKER + ".draft")
            with draft.open("wb") as file:
                file.write(encode_facts(facts))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(directory / COMPLETE_MARKER)
            _sync_directories(directory)

    def prepare(self, files: tuple[RemoteFile, ...]) -> int:
        """Make room for the files, drop what is left of others, and return how many bytes are there already.

        Files of an earlier, incomplete model directory count if their content can be verified.
        """
        with translated_errors(self.volume):
            self._partial.mkdir(exist_ok=True)
            if self.path.exists():
                if self.staging.exists():
                    shutil.rmtree(self.path)
                else:
                    self.path.rename(self.staging)
            self.staging.mkdir(exist_ok=True)
            self._parts.mkdir(exist_ok=True)
            self._sweep({file.name for file in files}, {file.identity for file in files})
            return sum(self._present_bytes(file) for file in files)

    def _sweep(self, names: set[str], identities: set[str]) -> None:
        for folder, _, file_names in os.walk(self.staging):
            for file_name in file_names:
                path = Path(folder, file_name)
                if path.relative_to(self.staging).as_posix() not in names:
                    path.unlink()
        for path in self._parts.iterdir():
            if path.stem not in identities:
                path.unlink()

    def _present_bytes(self, file: RemoteFile) -> int:
        if self.is_whole(file):
            return file.size_bytes
        staged, part = self.staging / file.name, self.part(file)
        if staged.exists():
            if file.checksum is None or part.exists():
                staged.unlink()
            else:
                staged.replace(part)
        if part.exists() and not file.is_resumable:
            part.unlink()
        return min(part.stat().st_size, file.size_bytes) if part.exists() else 0

    def part(self, file: RemoteFile) -> Path:
        """Where a file is that is not whole and verified yet."""
        return self._parts / f"{file.identity}.part"

    def is_whole(self, file: RemoteFile) -> bool:
        staged = self.staging / file.name
        return self._note(file).exists() and staged.is_file() and staged.stat().st_size == file.size_bytes

    def finish(self, file: RemoteFile) -> None:
        """Take a part that is whole, verified and on the disk into the model. The note first: alone it says nothing."""
        staged = self.staging / file.name
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.unlink(missing_ok=True)
        self._note(file).touch()
        self.part(file).replace(staged)

    def _note(self, file: RemoteFile) -> Path:
        return self._parts / f"{file.identity}.whole"

    def require_space(self, need_bytes: int, what: str) -> None:
        """Raise NoSpaceError unless so many bytes fit besides what is there."""
        statistics = os.statvfs(self.volume)
        free = statistics.f_bavail * statistics.f_frsize
        if not need_bytes or need_bytes + RESERVE_BYTES <= free:
            return
        capacity = statistics.f_blocks * statistics.f_frsize + need_bytes + RESERVE_BYTES - free
        raise NoSpaceError(
            f"{what} needs {format_bytes(need_bytes)} more in the volume, which has {format_bytes(free)} free.",
            hint=f"Set spec.cache.size to {_as_quantity(capacity)} or more.",
            need_bytes=need_bytes + RESERVE_BYTES,
            have_bytes=free,
        )

    def publish(self, facts: ModelFacts) -> None:
        """Make the staged files the model. Whoever sees the directory from now on sees all of it."""
        self.write_facts(facts, self.staging)
        with translated_errors(self.volume):
            self.staging.rename(self.path)
            _sync_directory(self.volume)
        self.discard_partial()

    def discard_partial(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


@contextmanager
def translated_errors(volume: Path) -> Iterator[None]:
    """Turn the filesystem's refusals into errors that name the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"No space left in {volume}.", hint="Set a larger spec.cache.size.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DownloadError(
                f"{volume} cannot be written to: {error.strerror}.",
                hint="The volume must be writable for this user: set fsGroup, or make it writable for the group.",
            ) from error
        raise DownloadError(f"{volume}: {error}.") from error


def _as_quantity(capacity_bytes: int) -> str:
    """Return the size of a volume with so much room, a filesystem's own share on top."""
    size = capacity_bytes * 21 // 20
    unit, suffix = ((1 << 30), "Gi") if size >= 4 << 30 else ((1 << 20), "Mi")
    return f"{-(-size // unit)}{suffix}"


def _sync_directories(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync_directory(Path(folder))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
