"""Starts and stops a `quire serve` process for the benchmarks."""

import asyncio
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from client import Timing, closed_loop


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    host: str
    port: int
    pid: int
    started: float
    """`time.perf_counter()` right before the process was started."""


def is_answering(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def serving(arguments: Sequence[str], *, python: str = sys.executable) -> Iterator[RunningServer]:
    """Run `quire serve …` (of the checkout that `python` has) on a free port; yield at once, and stop it at the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        command = [python, "-m", "quire_cli", "serve", *arguments, "--fd", str(listener.fileno())]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[listener.fileno()]
        )
    try:
        yield RunningServer(host=host, port=port, pid=process.pid, started=started)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # frozen
            process.kill()
            process.wait()


def wait_ready(server: RunningServer, timeout_s: float = 300.0) -> float:
    """Poll /readyz until it answers 200. Returns the seconds since the process was started."""
    while time.perf_counter() - server.started < timeout_s:
        if is_answering(f"http://{server.host}:{server.port}/readyz"):
            return time.perf_counter() - server.started
        time.sleep(0.01)
    raise TimeoutError(f"not ready after {timeout_s} s")


def measure_served(
    arguments: Sequence[str],
    prompts: Sequence[Sequence[int]],
    warm: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    concurrency: int,
    python: str = sys.executable,
) -> tuple[list[Timing], float]:
    """Start a server, warm it up, and load it until every prompt is done. Returns timings and wall time in seconds."""
    with serving([*arguments, "--served-model-name", "model"], python=python) as server:
        wait_ready(server)
        asyncio.run(closed_loop(server.host, server.port, "model", warm, 8, concurrency))
        return asyncio.run(closed_loop(server.host, server.port, "model", prompts, max_tokens, concurrency))
