"""The API process's event loop: the HTTP server, the loading of the model, and whichever end comes first.

`serve` does what must come before the heavy imports of this module.
"""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from quire_contract.phases import Phase, Readiness
from quire_contract.termination import TerminationMessage
from quire_server.api.app import create_app
from quire_server.api_process.arguments import ServeArguments
from quire_server.api_process.stats_log import log_stats
from quire_server.download.model_source import ReadinessReport, resolve_model
from quire_server.engine.border.client import EngineClient
from quire_server.engine.border.launch import EngineProcess
from quire_server.frontend.frontend import Frontend
from quire_server.frontend.metrics import ServerMetrics
from quire_server.shared.abandonable import run_abandonable
from quire_server.shared.config import EngineConfig, ServerConfig
from quire_server.shared.errors import EngineDeadError, StartupError
from quire_server.tokens.generation_defaults import read_generation_defaults
from quire_server.tokens.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than proxies keep idle connections, so that none is closed under a request on its way."""
SWITCH_INTERVAL_S = 0.001
"""How long a thread that works on a long text may keep the interpreter's lock while the event loop asks for it. One
request makes the loop ask several times, so Python's own 5 ms would be felt."""
FLUSH_S = 5
"""How long responses that have ended may take to leave."""


class Serving:
    """One run of the API process."""

    def __init__(self, arguments: ServeArguments, listener: socket.socket, process: EngineProcess) -> None:
        self._config: ServerConfig = arguments.config
        self._source = arguments.source
        self._listener = listener
        self._metrics = ServerMetrics(self._config.engine)
        self._client = EngineClient(
            process,
            self._config.engine,
            heartbeat_timeout_s=self._config.engine_heartbeat_timeout_s,
            on_step=self._metrics.on_step,
        )
        self._frontend = Frontend(self._config, self._client, self._metrics)
        self._num_signals = 0
        self._signalled = asyncio.Event()
        self._signalled_again = asyncio.Event()
        self._started = time.monotonic()

    async def run(self) -> TerminationMessage | None:
        """Serve to the end; return why that was a failure, or None."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        server = _build_http_server(self._frontend)
        http = asyncio.create_task(server.serve(sockets=[self._listener]), name="http")
        log.info("Listening on %s:%d", *self._listener.getsockname()[:2])
        self._handle_signals()
        end = await self._run_to_end()
        server.should_exit = True
        await http
        await self._client.stop()
        return end

    async def _run_to_end(self) -> TerminationMessage | None:
        """Load, serve and drain; return why the process failed, or None."""
        load = asyncio.create_task(self._load(), name="load")
        signalled = asyncio.create_task(self._signalled.wait())
        died = asyncio.create_task(self._client.died.wait())
        stats = asyncio.create_task(self._log_stats())
        try:
            await asyncio.wait({load, signalled, died}, return_when=asyncio.FIRST_COMPLETED)
            if load.done() and (failure := _failure_of(load)) is not None and self._client.death is None:
                return failure
            await asyncio.wait({signalled, died}, return_when=asyncio.FIRST_COMPLETED)
            if self._client.death is None:
                await self._drain()
            return self._client.death
        finally:
            for task in (load, signalled, died, stats):
                task.cancel()
            await asyncio.gather(load, signalled, died, stats, return_exceptions=True)

    async def _load(self) -> None:
        report = self._report_from_thread()
        path = await run_abandonable(lambda: resolve_model(self._source, report))
        config = _with_path(self._config.engine, path)
        self._client.report(Readiness(phase=Phase.STARTING, message="Starting the engine"))
        await self._client.start(config)
        tokenizer = await asyncio.to_thread(
            load_tokenizer, path, config.model.tokenizer, chat_template=config.model.chat_template
        )
        is_auto = config.model.generation_config == "auto"
        defaults = await asyncio.to_thread(read_generation_defaults, path) if is_auto else {}
        if defaults:
            log.info("Sampling defaults from the model's generation_config.json: %s", dict(defaults))
        self._frontend.set_model(tokenizer, defaults)
        info = await self._client.wait_until_ready()
        self._metrics.on_ready(info)
        log.info(
            "Ready in %.2f s: model=%s device=%s dtype=%s max_model_len=%d kv_cache_tokens=%d load_seconds=%s",
            time.monotonic() - self._started,
            ",".join(config.model.served_model_names),
            info.device,
            info.dtype,
            info.max_model_len,
            info.num_blocks * info.block_size,
            info.load_seconds,
        )
        gc.collect()
        gc.freeze()  # what start-up made stays; collections need not walk it

    def _report_from_thread(self) -> ReadinessReport:
        loop = asyncio.get_running_loop()

        def report(readiness: Readiness) -> None:
            loop.call_soon_threadsafe(self._client.report, readiness)

        return report

    async def _log_stats(self) -> None:
        if self._config.log_stats:
            await log_stats(self._metrics, self._client)

    async def _drain(self) -> None:
        timeout_s = self._config.shutdown_timeout_s
        log.info("Draining: requests=%d timeout=%.0fs", self._client.num_open_requests, timeout_s)
        drain = asyncio.create_task(self._client.drain(timeout_s))
        hurry = asyncio.create_task(self._signalled_again.wait())
        died = asyncio.create_task(self._client.died.wait())
        await asyncio.wait({drain, hurry, died}, return_when=asyncio.FIRST_COMPLETED)
        if not drain.done():
            drain.cancel()
        hurry.cancel()
        died.cancel()
        await asyncio.gather(drain, hurry, died, return_exceptions=True)
        num_aborted = await self._client.drain(0.0) if drain.cancelled() else drain.result()
        if num_aborted:
            log.warning("Aborted requests=%d that were still running", num_aborted)

    def _handle_signals(self) -> None:
        """For good: a signal after the end must not kill the process while it says goodbye."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("Received %s", signal.Signals(number).name)
        self._client.begin_drain()  # at once: the next request is refused
        (self._signalled_again if self._signalled.is_set() else self._signalled).set()


class _HttpServer(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _build_http_server(frontend: Frontend) -> uvicorn.Server:
    return _HttpServer(
        uvicorn.Config(
            create_app(frontend),
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FLUSH_S,
        )
    )


def _with_path(config: EngineConfig, path: Path) -> EngineConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))


def _failure_of(load: "asyncio.Task[None]") -> TerminationMessage | None:
    error = load.exception()
    if error is None or isinstance(error, EngineDeadError):
        return None
    if isinstance(error, StartupError):
        return error.termination
    log.error("The start failed", exc_info=error)
    return TerminationMessage(code="StartupFailed", stage="Loading", message=f"{type(error).__name__}: {error}")
