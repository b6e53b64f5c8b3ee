"""How far a download is: the counters, and who is told (the operator over HTTP, a log, a terminal).

`Meter` has no clock but the one it is given. Thread-safe, and safe in a signal handler of any thread.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6, IPPROTO_IPV6, IPV6_V6ONLY, has_dualstack_ipv6, socket
from typing import Final

import msgspec

from quire_contract.model_facts import DownloadProgress
from quire_contract.paths import LIVEZ, PROGRESS
from quire_contract.units import format_bytes

WINDOW_S: Final = 5.0
LOG_PERIOD_S: Final = 10.0
_SAMPLE_PERIOD_S: Final = 0.1
_BAR_PERIOD_S: Final = 0.5

logger = logging.getLogger(__name__)


class Meter:
    """Counts bytes. What was there before the download is done, but says nothing about the rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._total: int | None = None
        self._done = 0
        self._received = 0
        self._message = ""
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])

    def start(self, total_bytes: int, done_bytes: int) -> None:
        """Take note of the listing, and of what of it is there already."""
        with self._lock:
            self._total, self._done, self._message = total_bytes, done_bytes, ""
            self._samples = deque([(self._clock(), self._received)])

    def receive(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._received += num_bytes
            now = self._clock()
            if now - self._samples[-1][0] >= _SAMPLE_PERIOD_S:
                self._samples.append((now, self._received))
            while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW_S:
                self._samples.popleft()

    def discard(self, num_bytes: int) -> None:
        """Take back bytes that were of no use."""
        with self._lock:
            self._done -= num_bytes

    def say(self, message: str) -> None:
        """Say what goes on where that is not the transfer; empty: it is."""
        with self._lock:
            self._message = message

    @property
    def progress(self) -> DownloadProgress:
        with self._lock:
            rate = self._rate()
            left = None if self._total is None else self._total - self._done
            eta = left / rate if left is not None and rate else None
            return DownloadProgress(
                done_bytes=self._done,
                total_bytes=self._total,
                bytes_per_second=rate,
                eta_seconds=eta,
                message=self._message,
            )

    def _rate(self) -> float | None:
        """Return the mean over the window, up to now: a stalled transfer is seen to slow down."""
        now = self._clock()
        since, received = self._samples[0]
        for when, received_then in self._samples:
            if now - when <= WINDOW_S:
                break
            since, received = when, received_then
        if self._total is None or now - since < _SAMPLE_PERIOD_S:
            return None
        return (self._received - received) / (now - since)


def describe(progress: DownloadProgress) -> str:
    """Return one line for a log."""
    if progress.total_bytes is None:
        return progress.message or "starting"
    parts = [f"{format_bytes(progress.done_bytes)} of {format_bytes(progress.total_bytes)}"]
    if progress.total_bytes:
        parts[0] += f" ({100 * progress.done_bytes // progress.total_bytes} %)"
    if progress.bytes_per_second is not None:
        parts.append(f"{format_bytes(int(progress.bytes_per_second))}/s")
    if progress.eta_seconds is not None:
        parts.append(f"{progress.eta_seconds:.0f} s left")
    return ", ".join(parts) + (f"; {progress.message}" if progress.message else "")


@contextmanager
def progress_server(port: int, meter: Meter) -> Iterator[int]:
    """Answer `GET /progress` and `GET /livez` while the context lasts; gives the port (0: any free one).

    Raises OSError where the port is taken.
    """
    server = _ProgressServer(("", port), _handler(meter))
    threading.Thread(target=server.serve_forever, name="progress", daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class _ProgressServer(ThreadingHTTPServer):
    address_family = AF_INET6 if has_dualstack_ipv6() else AF_INET
    daemon_threads = True

    def server_bind(self) -> None:
        listener: socket = self.socket
        if self.address_family == AF_INET6:
            listener.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 0)
        listener.bind(self.server_address)
        self.server_address = listener.getsockname()


def _handler(meter: Meter) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == PROGRESS:
                self._answer(HTTPStatus.OK, "application/json", msgspec.json.encode(meter.progress))
            elif path == LIVEZ:
                self._answer(HTTPStatus.OK, "text/plain", b"ok\n")
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"not found\n")

        def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes and polls are no news."""

    return Handler


@contextmanager
def console_reports(meter: Meter) -> Iterator[None]:
    """Show progress on standard error while the context lasts: a bar on a terminal, else a line now and then."""
    over = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _log_lines
    thread = threading.Thread(target=show, args=(meter, over), name="reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=1.0)


def _log_lines(meter: Meter, over: threading.Event) -> None:
    while not over.wait(LOG_PERIOD_S):
        logger.info("%s", describe(meter.progress))


def _show_bar(meter: Meter, over: threading.Event) -> None:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm(), tqdm(bar_format="{percentage:3.0f}%|{bar:30}| {desc}", total=1, leave=False) as bar:
        while not over.wait(_BAR_PERIOD_S):
            progress = meter.progress
            bar.total, bar.n = progress.total_bytes or 1, progress.done_bytes
            bar.set_description_str(describe(progress))
