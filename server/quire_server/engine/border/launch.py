"""How the engine process is started, and how the two processes find each other.

The API process runs `ENGINE_COMMAND`, writes one line of JSON (`EngineLaunch`) to its standard input, and keeps that
pipe open for as long as it lives: end-of-file on it means that the parent is gone, whatever ended it. The engine
connects a PULL socket to `to_engine` and a PUSH socket to `from_engine`; the API process binds both, in a directory
that only this user can enter. What travels on them is in `messages`.

Used by both processes; knows neither asyncio nor torch, so that the engine starts before the heavy imports.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from quire_server.shared.config import EngineConfig
from quire_server.shared.errors import ConfigError

ENGINE_COMMAND = (sys.executable, "-m", "quire_server.engine_process.process")
_MAX_PARENT_LENGTH = 80
"""Of the 107 characters that a Unix socket's path may have."""


class EngineLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """All that the engine process is told at its start."""

    config: EngineConfig
    to_engine: str
    """ZeroMQ address that the engine pulls from."""
    from_engine: str
    """ZeroMQ address that the engine pushes to."""

    @property
    def socket_directory(self) -> Path:
        return Path(self.to_engine.removeprefix("ipc://")).parent


def _encode_path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not travel to the engine process")


def _decode_path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return kind(value)
    raise TypeError(f"{kind.__name__} does not travel to the engine process")


def encode_launch(launch: EngineLaunch) -> bytes:
    return msgspec.json.encode(launch, enc_hook=_encode_path) + b"\n"


def decode_launch(line: bytes) -> EngineLaunch:
    return msgspec.json.decode(line, type=EngineLaunch, dec_hook=_decode_path)


class EngineProcess:
    """The engine as a child process, with the private directory that holds its sockets. Owned by the API process."""

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._directory = _make_socket_directory()
        self.to_engine = f"ipc://{self._directory}/to_engine"
        self.from_engine = f"ipc://{self._directory}/from_engine"
        # A session of its own: Ctrl-C in a terminal reaches the API process alone, which then drains.
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def configure(self, config: EngineConfig) -> None:
        """Tell the engine what to serve; until then it imports and waits."""
        launch = EngineLaunch(config=config, to_engine=self.to_engine, from_engine=self.from_engine)
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(encode_launch(launch))
            self._popen.stdin.flush()
        except BrokenPipeError:
            return  # it died already; whoever watches the process says so

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._popen.poll()

    def terminate(self, grace_s: float) -> None:
        """End the process: SIGTERM, then SIGKILL after the grace period. Blocks until it is gone."""
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the process to end by itself; False if it has not."""
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        """Kill the process if it still runs, and remove the sockets' directory."""
        self.kill()
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # a configuration that was never read
                self._popen.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _make_socket_directory() -> Path:
    """Make a directory of mode 0700, where the path of a socket in it is short enough.

    Raises:
        ConfigError: no place can be written to.
    """
    for parent in (tempfile.gettempdir(), "/dev/shm"):
        if len(parent) <= _MAX_PARENT_LENGTH:
            with contextlib.suppress(OSError):
                return Path(tempfile.mkdtemp(prefix="quire-", dir=parent))
    raise ConfigError(
        "No directory for the sockets between the processes can be made.",
        stage="Starting",
        hint="Mount a writable /tmp, or name a short writable directory in $TMPDIR.",
    )


def receive_launch(stream: IO[bytes] | None = None) -> EngineLaunch:
    """In the engine process: read the launch, and from then on never outlive the parent.

    Blocks until the parent has written it. Exits when the parent went away before.
    """
    stream = stream or sys.stdin.buffer
    line = stream.readline()
    if not line:
        raise SystemExit(0)
    launch = decode_launch(line)
    # The descriptor, not the stream: a thread that waits inside a buffered stream cannot be left at the exit.
    arguments = (stream.fileno(), launch.socket_directory)
    threading.Thread(target=_exit_at_end_of_file, args=arguments, name="parent-watch", daemon=True).start()
    return launch


def _exit_at_end_of_file(descriptor: int, socket_directory: Path) -> None:
    while os.read(descriptor, 4096):
        pass
    shutil.rmtree(socket_directory, ignore_errors=True)  # the parent was killed, or it has done so itself
    os._exit(0)
