import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from quire_contract.model_facts import ModelFacts
from quire_contract.paths import COMPLETE_MARKER
from quire_server.download.errors import DownloadError, NoSpaceError
from quire_server.download.source import Checksum, RemoteFile
from quire_server.download.volume import RESERVE_BYTES, ModelDirectory

FILE = RemoteFile(name="a/b.bin", size_bytes=4, checksum=Checksum(kind="md5", hex="00"))
FACTS = ModelFacts(path="key", bytes=4)
GIB = 1 << 30


def fill(model: ModelDirectory, file: RemoteFile, content: bytes = b"data") -> None:
    model.part(file).write_bytes(content)


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int, capacity: int) -> None:
    statistics = SimpleNamespace(f_bavail=free // 4096, f_blocks=capacity // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: statistics)


def test_need_and_have_are_told_and_the_size_that_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes(monkeypatch, 3 * GIB, 10 * GIB)
    model = ModelDirectory(tmp_path, "key")
    model.require_space(3 * GIB - RESERVE_BYTES, "hf://a/b")
    with pytest.raises(NoSpaceError, match=r"needs 5.0 GiB more in the volume, which has 3.0 GiB free") as told:
        model.require_space(5 * GIB, "hf://a/b")
    termination = told.value.termination
    assert (termination.need_bytes, termination.have_bytes) == (5 * GIB + RESERVE_BYTES, 3 * GIB)
    assert "spec.cache.size to 13Gi" in termination.hint  # 7 in use + 5, and the reserve


def test_a_model_that_is_there_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes(monkeypatch, 0, GIB)
    ModelDirectory(tmp_path, "key").require_space(0, "hf://a/b")


def test_parts_count_and_the_rest_is_swept_away(tmp_path: Path) -> None:
    model = ModelDirectory(tmp_path, "key")
    other = RemoteFile(name="c.bin", size_bytes=9, version="1")
    assert model.prepare((FILE, other)) == 0
    fill(model, FILE)
    fill(model, other, b"123")
    assert model.prepare((FILE, other)) == 7
    model.finish(FILE)
    assert model.is_whole(FILE)
    assert model.prepare((FILE,)) == 4
    assert not model.part(other).exists()
    newer = RemoteFile(name=FILE.name, size_bytes=4, checksum=Checksum(kind="md5", hex="01"))
    assert not model.is_whole(newer)
    assert model.prepare((newer,)) == 4  # its content will tell
    assert model.part(newer).read_bytes() == b"data"


def test_a_part_that_nothing_would_verify_is_not_continued(tmp_path: Path) -> None:
    model = ModelDirectory(tmp_path, "key")
    unknown = RemoteFile(name="c.bin", size_bytes=9)
    model.prepare((unknown,))
    fill(model, unknown)
    assert model.prepare((unknown,)) == 0
    assert not model.part(unknown).exists()


def test_a_crash_between_note_and_rename_loses_nothing(tmp_path: Path) -> None:
    model = ModelDirectory(tmp_path, "key")
    model.prepare((FILE,))
    fill(model, FILE)
    (model.part(FILE).with_suffix(".whole")).touch()
    assert not model.is_whole(FILE)
    assert model.prepare((FILE,)) == 4


def test_an_incomplete_directory_gives_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "key" / "a").mkdir(parents=True)
    (tmp_path / "key" / "a" / "b.bin").write_bytes(b"data")
    (tmp_path / "key" / ".cache").mkdir()
    (tmp_path / "key" / ".cache" / "rest").write_bytes(b"x")
    model = ModelDirectory(tmp_path, "key")
    assert model.prepare((FILE,)) == 4
    assert not model.path.exists()
    assert [path.name for path in model.staging.rglob("*") if path.is_file()] == []


def test_publishing_is_one_step_with_the_marker_inside(tmp_path: Path) -> None:
    model = ModelDirectory(tmp_path, "key")
    model.prepare((FILE,))
    fill(model, FILE)
    model.finish(FILE)
    assert not model.is_marked()
    model.publish(FACTS)
    assert model.is_marked()
    assert model.read_facts() == FACTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key"]
    assert (tmp_path / "key" / COMPLETE_MARKER).is_file()


def test_an_empty_marker_has_no_facts(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / COMPLETE_MARKER).touch()
    model = ModelDirectory(tmp_path, "key")
    assert model.is_marked()
    assert model.read_facts() is None


@pytest.mark.parametrize(
    ("number", "error", "says"),
    [
        (errno.ENOLCK, DownloadError, "no file locks"),
        (errno.EOPNOTSUPP, DownloadError, "no file locks"),
    ],
)
def test_a_filesystem_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[DownloadError], says: str
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(error, match=says), ModelDirectory(tmp_path, "key").locked(lambda: None):
        pass


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.ENOSPC, "NoSpace", "No space left"),
        (errno.EDQUOT, "NoSpace", "No space left"),
        (errno.EROFS, "DownloadFailed", "cannot be written to: Read-only"),
        (errno.EACCES, "DownloadFailed", "cannot be written to: Permission denied"),
        (errno.EIO, "DownloadFailed", "Input/output error"),
    ],
)
def test_what_the_filesystem_refuses_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str, says: str
) -> None:
    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DownloadError, match=says) as told:
        ModelDirectory(tmp_path, "key").prepare((FILE,))
    assert told.value.termination.code == code
