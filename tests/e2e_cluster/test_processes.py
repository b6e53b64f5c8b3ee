"""Processes are found again by their record, and nothing else is ever signalled."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.processes import ProcessRecord, Service, find_processes, read_own_record, stop_process
from cluster.shell import ClusterError, wait_until

SLEEP = ["sleep", "60"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); input()",
]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(name="sleeper", directory=tmp_path / "services")
    yield service
    service.stop(grace_s=0)


def test_a_started_process_is_found_by_its_record_and_stopped(service: Service) -> None:
    record = service.start(SLEEP)
    assert Service(name="sleeper", directory=service.directory).find() == record
    service.stop()
    assert service.find() is None
    assert not record.is_running()
    service.stop()


def test_a_process_that_does_not_listen_is_killed(service: Service) -> None:
    record = service.start([*STUBBORN[:2], STUBBORN[2].replace("input()", "signal.pause()")])
    wait_until(lambda: "deaf" in service.log.read_text(), "deafness", timeout_s=20)
    service.stop(grace_s=0.1)
    assert not record.is_running()


def test_a_recycled_process_id_is_not_signalled(service: Service) -> None:
    record = service.start(SLEEP)
    other = ProcessRecord(pid=record.pid, start_time=record.start_time - 1)
    assert not other.is_running()
    stop_process(other, grace_s=0)
    assert record.is_running()


def test_a_record_of_somebody_else_is_not_ours(service: Service) -> None:
    service.directory.mkdir()
    (service.directory / "sleeper.process").write_text(json.dumps({"pid": os.getpid(), "start_time": 0}))
    assert service.find() is None
    service.stop(grace_s=0)


@pytest.mark.parametrize("content", ["", "{}", '{"pid": 1}', "[1, 2]", '{"pid": 1, "start_time": 2, "more": 3}'])
def test_a_damaged_record_is_no_process(service: Service, content: str) -> None:
    service.directory.mkdir()
    (service.directory / "sleeper.process").write_text(content)
    assert service.find() is None


def test_a_dead_child_that_nobody_waited_for_does_not_count_as_running() -> None:
    child = subprocess.Popen(SLEEP)
    wait_until(lambda: any(found.pid == child.pid for found in find_processes("60")), "the child", timeout_s=10)
    record = next(found for found in find_processes("60") if found.pid == child.pid)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not record.is_running(), "end", timeout_s=10)
    child.returncode = -9


def test_two_starts_are_refused_and_a_stopped_one_starts_as_before(service: Service) -> None:
    first = service.start(SLEEP)
    with pytest.raises(ClusterError, match="sleeper is running already"):
        service.start(SLEEP)
    service.stop()
    second = service.start_again()
    assert second != first
    arguments = Path(f"/proc/{second.pid}/cmdline")
    wait_until(lambda: arguments.read_bytes().split(b"\0")[:2] == [b"sleep", b"60"], "the same command", timeout_s=10)


def test_one_that_was_never_started_cannot_start_again(service: Service) -> None:
    with pytest.raises(ClusterError, match="never been started"):
        service.start_again()


def test_the_end_of_a_process_is_described_by_its_log(service: Service) -> None:
    service.start(["sh", "-c", "echo address in use; sleep 60"])
    wait_until(lambda: "in use" in service.log.read_text(), "the line", timeout_s=10)
    assert service.describe_end() is None
    service.stop(grace_s=0)
    description = service.describe_end()
    assert description is not None
    assert "sleeper has ended" in description
    assert "address in use" in description


def test_this_process_runs() -> None:
    assert read_own_record().is_running()
    assert ProcessRecord(**read_own_record().as_dict()) == read_own_record()
