"""Run tools and wait for things: every failure names what failed and shows the end of its output or log.

Does not know what it runs. `ClusterError` is the one error that the tool reports without a traceback.
"""

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_TAIL_LINES = 20
_POLL_S = 0.1
_TELL_EVERY_S = 15.0
_MAX_TOLD = 100


class ClusterError(Exception):
    """Something that the reader of the message can act on."""


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    text_input: str | None = None,
    timeout_s: float | None = 60.0,
) -> str:
    """Run a command to its end and return its standard output.

    `env` adds to this process's environment. Raises ClusterError with the end of the output where it fails.
    """
    arguments = [str(part) for part in command]
    try:
        done = subprocess.run(
            arguments,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            input=text_input,
            stdin=subprocess.DEVNULL if text_input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise ClusterError(f"{arguments[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{_shorten(arguments)}` did not end within {timeout_s:.0f} s") from None
    if done.returncode != 0:
        output = tail_of_text(done.stdout + done.stderr)
        raise ClusterError(f"`{_shorten(arguments)}` failed with status {done.returncode}:\n{output}")
    return done.stdout


def succeeds(command: Sequence[str | Path], *, timeout_s: float = 10.0) -> bool:
    """Tell whether a command ends with status 0."""
    try:
        run(command, timeout_s=timeout_s)
    except ClusterError:
        return False
    return True


def run_logged(
    command: Sequence[str | Path],
    log: Path,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> None:
    """Run a long command with its output in a log file, and tell now and then how far it is.

    Raises ClusterError with the end of the log where it fails.
    """
    arguments = [str(part) for part in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                arguments,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError:
            raise ClusterError(f"{arguments[0]} is not installed") from None
        with process:
            try:
                status = _wait_telling(process, log, timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                said = f"did not end within {timeout_s:.0f} s{tail_of(log)}"
                raise ClusterError(f"`{_shorten(arguments)}` {said}") from None
            except BaseException:
                process.kill()
                raise
    if status != 0:
        raise ClusterError(f"`{_shorten(arguments)}` failed with status {status}{tail_of(log)}")


def _wait_telling(process: subprocess.Popen[bytes], log: Path, timeout_s: float | None) -> int:
    """Wait for the end, and print the log's last line every so often. Raises TimeoutExpired at the time-out."""
    began = time.monotonic()
    while True:
        passed_s = time.monotonic() - began
        if timeout_s is not None and passed_s > timeout_s:
            raise subprocess.TimeoutExpired(process.args, timeout_s)
        try:
            return process.wait(timeout=_TELL_EVERY_S)
        except subprocess.TimeoutExpired:
            line = tail_of_text(log.read_text(errors="replace")).rpartition("\n")[2]
            print(f"  {passed_s + _TELL_EVERY_S:4.0f} s  {line[:_MAX_TOLD]}", flush=True)


def wait_until(
    is_true: Callable[[], bool],
    what: str,
    *,
    timeout_s: float,
    log: Path | None = None,
    give_up: Callable[[], str | None] = lambda: None,
) -> None:
    """Poll until true. `give_up` returns the reason why waiting longer is of no use, or None.

    Raises ClusterError with that reason, or with the end of the log where the time is over.
    """
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if (reason := give_up()) is not None:
            raise ClusterError(f"{what}: {reason}")
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {timeout_s:.0f} s{tail_of(log)}")
        time.sleep(_POLL_S)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file: one process of this machine at a time, freed even where the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tail_of(log: Path | None) -> str:
    """Return the end of a log as lines to put after a message; empty where there is no log."""
    if log is None or not log.exists():
        return ""
    return f"\nThe end of {log}:\n{tail_of_text(log.read_text(errors='replace'))}"


def tail_of_text(text: str) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-_TAIL_LINES:])


def _shorten(arguments: Sequence[str], limit: int = 200) -> str:
    line = " ".join(arguments)
    return line if len(line) <= limit else f"{line[:limit]}…"
