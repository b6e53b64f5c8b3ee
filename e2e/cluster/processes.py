"""Long-lived processes, known by a record on disk: start, find again, stop. A recycled process id is never signalled.

A record holds the process id and the time at which the kernel started it; both must match. Each process leads its own
session, so that it outlives the tool and no terminal signal reaches it. Knows nothing of what runs.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.shell import ClusterError, tail_of, wait_until

_POLL_S = 0.02
_STAT_FIELD_STATE = 0
_STAT_FIELD_START_TIME = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """A process as it was started."""

    pid: int
    start_time: int  # clock ticks since boot

    def is_running(self) -> bool:
        """Tell whether this very process still runs."""
        return _start_time_of(self.pid) == self.start_time

    def as_dict(self) -> dict[str, int]:
        """Return what `ProcessRecord(**…)` takes."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A named long-lived process with its log and record in one directory."""

    name: str
    directory: Path

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def _record_path(self) -> Path:
        return self.directory / f"{self.name}.process"

    @property
    def _command_path(self) -> Path:
        return self.directory / f"{self.name}.command"

    def find(self) -> ProcessRecord | None:
        """Return the running process, or None."""
        try:
            record = ProcessRecord(**json.loads(self._record_path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return record if record.is_running() else None

    def start(self, command: Sequence[str | Path]) -> ProcessRecord:
        """Start the process. It must not be running. The log is appended to."""
        if self.find() is not None:
            raise ClusterError(f"{self.name} is running already")
        arguments = [str(part) for part in command]
        self.directory.mkdir(parents=True, exist_ok=True)
        self._command_path.write_text(json.dumps(arguments))
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                arguments,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        start_time = _start_time_of(process.pid)
        if start_time is None:
            raise ClusterError(f"{self.name} has ended at once{tail_of(self.log)}")
        record = ProcessRecord(pid=process.pid, start_time=start_time)
        self._record_path.write_text(json.dumps(record.as_dict()))
        process.returncode = 0  # it is not waited for here: the record, not this object, stands for the process
        return record

    def start_again(self) -> ProcessRecord:
        """Start the process with the command that it was last started with."""
        try:
            command = json.loads(self._command_path.read_text())
        except OSError:
            raise ClusterError(f"{self.name} has never been started in {self.directory}") from None
        return self.start(command)

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Ask the process to end, insist after the grace, and return when it is gone."""
        record = self.find()
        if record is not None:
            stop_process(record, grace_s=grace_s)
        self._record_path.unlink(missing_ok=True)

    def describe_end(self) -> str | None:
        """Return what its log says last where the process does not run, or None: for `wait_until(give_up=…)`."""
        return None if self.find() else f"{self.name} has ended{tail_of(self.log)}"


def read_own_record() -> ProcessRecord:
    """Return the record of this process."""
    start_time = _start_time_of(os.getpid())
    assert start_time is not None
    return ProcessRecord(pid=os.getpid(), start_time=start_time)


def stop_process(record: ProcessRecord, *, grace_s: float) -> None:
    """End a process: SIGTERM, then SIGKILL after the grace."""
    _signal(record, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while record.is_running() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    _signal(record, signal.SIGKILL)
    wait_until(lambda: not record.is_running(), f"end of process {record.pid}", timeout_s=10)


def find_processes(text: str) -> list[ProcessRecord]:
    """Return the processes that have an argument which starts with the text, this one excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            start_time = _start_time_of(int(entry.name))
            if start_time is not None and any(argument.startswith(text.encode()) for argument in arguments):
                found.append(ProcessRecord(pid=int(entry.name), start_time=start_time))
    return found


def _signal(record: ProcessRecord, number: signal.Signals) -> None:
    if record.is_running():
        with suppress(ProcessLookupError):
            os.kill(record.pid, number)


def _start_time_of(pid: int) -> int | None:
    """Return when a process started, or None where there is none or only its remains (a zombie)."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return None if fields[_STAT_FIELD_STATE] in "ZX" else int(fields[_STAT_FIELD_START_TIME])
