"""One server process of `quire up`: started, watched through `/readyz`, stopped.

Knows nothing of scaling or of the gateway; its owner is told of every change through one callback.
"""

import asyncio
import ctypes
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import msgspec

from quire_cli.local.console import Bar
from quire_contract import paths
from quire_contract.nesting import bounded_nesting
from quire_contract.phases import Phase, Readiness
from quire_contract.termination import TerminationMessage, decode_termination
from quire_gateway.backends import Backend

POLL_S = 0.1
SLOW_POLL_S = 1.0
KILL_AFTER_S = 10.0
PR_SET_PDEATHSIG = 1
_ORDER = {
    phase: i
    for i, phase in enumerate((Phase.STARTING, Phase.DOWNLOADING, Phase.LOADING, Phase.WARMING_UP, Phase.READY))
}
_libc = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaEnd:
    """How a replica ended."""

    exit_code: int
    cause: TerminationMessage | None

    def describe(self) -> str:
        if self.cause is not None:
            hint = f" ({self.cause.hint})" if self.cause.hint else ""
            return f"{self.cause.code}: {self.cause.message}{hint}"
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        return f"exited with code {self.exit_code}"


class Replica:
    """A `quire serve` process on a port of its own. Used on one event loop."""

    def __init__(self, name: str, generation: int, log: Path, on_change: Callable[["Replica", Phase], None]) -> None:
        self.name = name
        self.generation = generation
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.backend = Backend(host=host, port=port)
        self.readiness = Readiness(phase=Phase.STARTING)
        self.end: ReplicaEnd | None = None
        self.is_stopping = False
        self.log = log
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._bar: Bar | None = None

    def show_progress(self, bar: Bar) -> None:
        """Draw the way to Ready on this bar, and close it there."""
        self._bar = bar

    @property
    def progress(self) -> tuple[int, float]:
        """Orders replicas by how near to Ready they are."""
        return _ORDER.get(self.readiness.phase, 0), self.readiness.percent or 0.0

    @property
    def is_ready(self) -> bool:
        return self.readiness.phase is Phase.READY and not self.is_stopping and self.end is None

    async def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process, once; its output goes to the replica's log file.

        It inherits the socket that it listens on: a port found free and bound later could be somebody else's by then.
        """
        with self._listener, self.log.open("ab") as log:
            descriptor, name = tempfile.mkstemp(prefix="quire-end-")
            os.close(descriptor)
            termination = Path(name)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "quire_cli",
                "serve",
                "--fd",
                str(self._listener.fileno()),
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment, paths.TERMINATION_LOG_ENV: str(termination)},
                pass_fds=[self._listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the supervisor, which then stops the replicas in order
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self._watch = asyncio.create_task(self._watch_process(self._process, termination))

    async def stop(self, timeout_s: float) -> None:
        """Drain and end the process: SIGTERM, and SIGKILL once it has had `timeout_s` and a little more."""
        process, watch = self._process, self._watch
        if process is None or watch is None:
            return
        if not self.is_stopping:
            self.is_stopping = True
            self._set(Readiness(phase=Phase.DRAINING))
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(timeout_s + KILL_AFTER_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
        await watch

    def hurry(self) -> None:
        """While it drains: have it end the requests that still run."""
        if self.is_stopping and self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)

    async def _watch_process(self, process: asyncio.subprocess.Process, termination: Path) -> None:
        polling = asyncio.create_task(self._poll())
        exit_code = await process.wait()
        polling.cancel()
        with suppress(asyncio.CancelledError):
            await polling
        self.end = ReplicaEnd(exit_code=exit_code, cause=decode_termination(termination.read_bytes()))
        termination.unlink()
        self._set(Readiness(phase=Phase.FAILED if exit_code else Phase.DRAINING, message=self.end.describe()))

    async def _poll(self) -> None:
        async with httpx2.AsyncClient(base_url=self.backend.url, timeout=2.0, trust_env=False) as client:
            while True:
                with suppress(httpx2.TransportError, ValueError), bounded_nesting():
                    response = await client.get(paths.READYZ)
                    self._set(msgspec.json.decode(response.content, type=Readiness))
                await asyncio.sleep(SLOW_POLL_S if self.is_ready else POLL_S)

    def _set(self, readiness: Readiness) -> None:
        if readiness == self.readiness and self.end is None:
            return
        before, self.readiness = self.readiness.phase, readiness
        if self._bar is not None:
            self._bar.show(readiness.percent or 0.0, f"{self.name}: {readiness.phase}")
            if readiness.phase not in _ORDER or readiness.phase is Phase.READY:
                self._bar.close()
                self._bar = None
        self._on_change(self, before)


def _end_with_parent() -> None:
    """In the child, before exec: have the kernel send SIGTERM when the supervisor dies, however it dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
