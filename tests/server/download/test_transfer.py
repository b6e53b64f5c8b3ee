import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire_server.download.errors import ChecksumMismatchError, DownloadError, SourceUnreachableError
from quire_server.download.progress import Meter
from quire_server.download.source import (
    Checksum,
    InterruptedTransferError,
    Listing,
    RemoteFile,
    StartOverError,
    start_hash,
)
from quire_server.download.transfer import RetryPolicy, Transfer, list_files
from quire_server.download.volume import ModelDirectory

CONTENT = bytes(range(200)) * 50
FAST = RetryPolicy(give_up_after_s=30.0, first_pause_s=0.001, longest_pause_s=0.002)
AT_ONCE = RetryPolicy(give_up_after_s=0.02, first_pause_s=0.01, longest_pause_s=0.01)


def remote(name: str = "f", size: int = len(CONTENT), *, is_known: bool = True) -> RemoteFile:
    checksum = Checksum(kind="sha256", hex=hashlib.sha256(CONTENT).hexdigest()) if is_known else None
    return RemoteFile(name=name, size_bytes=size, checksum=checksum, version="1")


class ScriptedSource:
    """Each read does what the next word says; then it sends everything."""

    def __init__(self, *script: str) -> None:
        self.script = list(script)
        self.starts: list[int] = []
        self.lock = threading.Lock()

    def list_files(self) -> Listing:
        if self.script:
            raise InterruptedTransferError(self.script.pop(0))
        return Listing(files=(remote(),))

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        with self.lock:
            self.starts.append(start)
            word = self.script.pop(0) if self.script else "all"
        if word == "refuse":
            raise InterruptedTransferError("503")
        if word == "break":
            yield CONTENT[start : start + 3000]
            raise InterruptedTransferError("reset")
        if word == "short":
            yield CONTENT[start : start + 1000]
            return
        if word == "changed":
            raise StartOverError
        if word == "wrong":
            yield bytes(len(CONTENT) - start)
            return
        if word == "long":
            yield CONTENT[start:] + b"more"
            return
        if word == "denied":
            raise DownloadError("denied")
        for position in range(start, file.size_bytes, 700):
            yield CONTENT[position : min(file.size_bytes, position + 700)]


def run(
    source: ScriptedSource, folder: Path, *files: RemoteFile, policy: RetryPolicy = FAST
) -> tuple[ModelDirectory, Meter]:
    model, meter = ModelDirectory(folder, "key"), Meter()
    wanted = files or (remote(),)
    present = model.prepare(wanted)
    meter.start(sum(file.size_bytes for file in wanted), present)
    Transfer(source, model, meter, policy).run(wanted)
    return model, meter


@pytest.mark.parametrize(
    ("script", "starts"),
    [
        ([], [0]),
        (["refuse", "refuse"], [0, 0, 0]),
        (["break", "break"], [0, 3000, 6000]),
        (["short", "refuse"], [0, 1000, 1000]),
        (["break", "changed"], [0, 3000, 0]),
        (["wrong"], [0, 0]),
        (["break", "wrong"], [0, 3000, 0]),
    ],
    ids=str,
)
def test_a_file_is_whole_in_the_end(tmp_path: Path, script: list[str], starts: list[int]) -> None:
    source = ScriptedSource(*script)
    model, meter = run(source, tmp_path)
    assert (model.staging / "f").read_bytes() == CONTENT
    assert source.starts == starts
    assert meter.progress.done_bytes == meter.progress.total_bytes == len(CONTENT)
    assert meter.progress.message == ""


def test_wrong_twice_is_the_end_and_nothing_of_it_stays(tmp_path: Path) -> None:
    with pytest.raises(ChecksumMismatchError, match=r"^f: the sha256 checksum is") as told:
        run(ScriptedSource("wrong", "wrong"), tmp_path)
    assert hashlib.sha256(CONTENT).hexdigest() in str(told.value)
    assert ModelDirectory(tmp_path, "key").prepare((remote(),)) == 0


def test_a_source_that_never_answers(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreachableError, match=r"^f: 503; given up after") as told:
        run(ScriptedSource(*["refuse"] * 1000), tmp_path, policy=AT_ONCE)
    assert told.value.termination.code == "SourceUnreachable"
    with pytest.raises(SourceUnreachableError, match=r"^hf://a/b: no route"):
        list_files(ScriptedSource(*["no route"] * 1000), "hf://a/b", Meter(), AT_ONCE)


def test_a_listing_is_asked_again() -> None:
    assert list_files(ScriptedSource("503", "503"), "hf://a/b", Meter(), FAST).size_bytes == len(CONTENT)


def test_progress_says_why_it_waits(tmp_path: Path) -> None:
    said: list[str] = []
    meter = Meter()
    meter.say = said.append  # type: ignore[method-assign]
    list_files(ScriptedSource("503 of the Hub"), "hf://a/b", meter, FAST)
    assert said == ["retrying in 0 s: 503 of the Hub"]


def test_what_was_there_is_verified_with_the_rest(tmp_path: Path) -> None:
    model = ModelDirectory(tmp_path, "key")
    model.prepare((remote(),))
    model.part(remote()).write_bytes(CONTENT[:5000])
    source = ScriptedSource()
    run(source, tmp_path)
    assert source.starts == [5000]
    model.prepare((remote(),))
    (model.staging / "f").unlink()
    model.part(remote()).write_bytes(b"x" * 5000)
    source = ScriptedSource()
    run(source, tmp_path)
    assert source.starts == [5000, 0]
    assert (model.staging / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("present", [b"", CONTENT, CONTENT + b"more"], ids=len)
def test_a_part_of_any_length(tmp_path: Path, present: bytes) -> None:
    model = ModelDirectory(tmp_path, "key")
    model.prepare((remote(),))
    model.part(remote()).write_bytes(present)
    source = ScriptedSource()
    run(source, tmp_path)
    assert source.starts == ([] if present == CONTENT else [0])


def test_more_than_was_announced(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="has changed at the source"):
        run(ScriptedSource("long"), tmp_path)


def test_empty_files_and_folders(tmp_path: Path) -> None:
    empty = RemoteFile(name="a/b/empty.json", size_bytes=0)
    model, _ = run(ScriptedSource(), tmp_path, empty, remote("a/f"), remote("f", is_known=False))
    assert (model.staging / "a" / "b" / "empty.json").read_bytes() == b""
    assert (model.staging / "a" / "f").read_bytes() == (model.staging / "f").read_bytes() == CONTENT


def test_one_failure_ends_the_others(tmp_path: Path) -> None:
    files = [remote(f"f{i}") for i in range(20)]
    source = ScriptedSource("denied")
    with pytest.raises(DownloadError, match="denied"):
        run(source, tmp_path, *files)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sha256", hashlib.sha256(b"123456789").hexdigest()),
        ("md5", hashlib.md5(b"123456789").hexdigest()),
        ("git", "e2e107ac61ac259b87c544f6e7a4eb03422c6c21"),  # printf 123456789 | git hash-object --stdin
        ("crc32c", "e3069283"),  # the check value of its definition
    ],
)
def test_checksums(kind: str, expected: str) -> None:
    file = RemoteFile(name="f", size_bytes=9, checksum=Checksum(kind=kind, hex=""))  # type: ignore[arg-type]
    hasher = start_hash(file)
    assert hasher is not None
    hasher.update(b"1234")
    hasher.update(b"56789")
    assert hasher.hexdigest() == expected
