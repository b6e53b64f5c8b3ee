"""The asyncio bridge to the engine process: requests go in, token ids come out, and every request reaches one end.

Owns the two sockets, the open requests and calls, and the verdict on whether the engine lives. Knows token ids alone:
text is made in `output_processor`. Lives on one event loop and never blocks it.

Invariants: a request is open from `generate()` until its stream has its last output, failed or was closed; closing a
stream before its end aborts the request in the engine at once. Its id is free when the engine has said the end of it,
which it does for each that it was sent: what comes until then is dropped. Once `died` is set, every open stream and
call raises `EngineDeadError`, and no new one is made.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterable

import msgspec

from quire_contract.phases import Phase, Readiness
from quire_contract.termination import TerminationMessage
from quire_server.engine.border.calls import EngineMethod, R, Reply
from quire_server.engine.border.launch import EngineProcess
from quire_server.engine.border.messages import (
    AbortRequests,
    AddRequest,
    EngineBusy,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineStep,
    FromEngine,
    Shutdown,
    ToEngine,
    encode,
    from_engine_decoder,
)
from quire_server.engine.border.open_calls import OpenCalls
from quire_server.engine.border.output_stream import OutputStream
from quire_server.engine.border.queue_limit import QueueLimit
from quire_server.engine.border.sockets import Sockets
from quire_server.engine.border.watchdog import Watchdog
from quire_server.engine.output import SchedulerStats
from quire_server.engine.request import EngineRequest
from quire_server.shared.config import EngineConfig
from quire_server.shared.errors import (
    DrainingError,
    EngineDeadError,
    InvalidRequestError,
    ModelLoadingError,
    QuireError,
)

LOADING_RETRY_AFTER_S = 5.0
DRAINING_RETRY_AFTER_S = 1.0
CALL_TIMEOUT_S = 60.0
LAST_WORDS_S = 0.5
"""How long a dead engine's socket is read for the message that says why."""


class EngineClient:
    """The engine as the API process sees it."""

    def __init__(
        self,
        process: EngineProcess,
        config: EngineConfig,
        *,
        heartbeat_timeout_s: float = 60.0,
        on_step: Callable[[EngineStep], None] | None = None,
    ) -> None:
        self.info: EngineReady | None = None
        self.stats = SchedulerStats()
        self.last_heartbeat = 0.0
        """Of `time.monotonic`, when the engine said something last; 0 before it said anything."""
        self.died = asyncio.Event()
        self.death: TerminationMessage | None = None
        """Why the engine died; set together with `died`."""
        self._process = process
        self._config = config
        self._watchdog = Watchdog(heartbeat_timeout_s)
        self._tick_s = min(1.0, heartbeat_timeout_s / 4)
        self._on_step = on_step
        self._limit = QueueLimit(config.scheduler.max_num_queued_reqs, config.scheduler.max_num_seqs)
        self._readiness = Readiness(phase=Phase.STARTING)
        self._open: dict[str, OutputStream] = {}
        self._closing: dict[str, OutputStream] = {}  # ended here; the engine's end of them is under way
        self._calls = OpenCalls(self._send)
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._settled = asyncio.Event()  # ready or dead
        self._is_draining = False
        self._is_stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: Sockets | None = None
        self._exit_fd: int | None = None

    # ---- start and end ----

    async def start(self, config: EngineConfig | None = None) -> None:
        """Connect and hand the engine its configuration; returns at once, `readiness` says the rest.

        `config` replaces the one given before, whose model path may not have been known then.
        """
        self._config = config or self._config
        self._sockets = Sockets(self._process)
        self._watch_exit()
        self._spawn(self._read(self._sockets))
        self._spawn(self._watch_heartbeat())
        self._process.configure(self._config)

    async def wait_until_ready(self) -> EngineReady:
        """Wait for the end of the start.

        Raises:
            EngineDeadError: it did not end in readiness.
        """
        await self._settled.wait()
        if self.info is None:
            raise self._dead_error()
        return self.info

    def report(self, readiness: Readiness) -> None:
        """Say what goes on before the engine is started, such as a download."""
        self._readiness = readiness

    def begin_drain(self) -> None:
        """Take no more requests; those that are open go on."""
        self._is_draining = True

    async def drain(self, timeout_s: float) -> int:
        """Take no more requests, wait for the open ones, then end the rest with `DrainingError`; returns how many.

        Calls that are open are not waited for: they go on, and end with `stop` if they have not by then.
        """
        self.begin_drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none_open.wait(), timeout_s)
        return self.fail_open_requests(DrainingError("The server shut down before this request was finished."))

    def fail_open_requests(self, error: QuireError) -> int:
        """End every open request with `error`, here and in the engine; returns how many there were."""
        open_streams = self._begin_closing(list(self._open))
        for stream in open_streams:
            stream.fail(error)
        return len(open_streams)

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the engine process and free everything. Open requests end with `EngineDeadError`."""
        self._is_stopping = True
        self.fail_open_requests(self._dead_error())
        self._closing.clear()
        self._calls.fail(self._dead_error)
        if self._sockets is not None:
            self._send(Shutdown())
            is_listening = self.info is not None and self.death is None
            if not await asyncio.to_thread(self._process.wait, grace_s if is_listening else 0.0):
                await asyncio.to_thread(self._process.terminate, 1.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._unwatch_exit()
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None
        await asyncio.to_thread(self._process.close)

    # ---- state ----

    @property
    def readiness(self) -> Readiness:
        if self.death is not None:
            return Readiness(phase=Phase.FAILED, message=self.death.message)
        if self._is_draining or self._is_stopping:
            return Readiness(phase=Phase.DRAINING, message=f"{len(self._open)} requests still run")
        return self._readiness

    @property
    def is_alive(self) -> bool:
        """Whether the engine, started or still starting, may yet serve."""
        return self.death is None

    @property
    def num_open_requests(self) -> int:
        return len(self._open)

    # ---- requests ----

    def generate(self, request: EngineRequest) -> OutputStream:
        """Send a request to the engine; iterate over the result, and close it to abort.

        Raises (here, before any output):
            ModelLoadingError, DrainingError, EngineDeadError: no request is taken now.
            QueueFullError: too many wait.
            InvalidRequestError: the request id is in use, or was a moment ago.
        While iterating:
            EngineDeadError, DrainingError: the request ended without its answer.
        What the engine itself refuses ends with FinishReason.ERROR and the error, encoded.
        """
        self._check_accepting()
        self._check_is_free(request.request_id)
        self._limit.check(len(self._open), self.stats, time.monotonic())
        self._send(AddRequest(request))  # first: what cannot be encoded was never open
        stream = OutputStream(request.request_id, self._abort_closed, num_branches=request.num_branches)
        self._open[request.request_id] = stream
        self._none_open.clear()
        return stream

    async def call(self, method: EngineMethod[R], timeout_s: float = CALL_TIMEOUT_S) -> R:
        """Let the engine do something that is not a request, between two steps, and return what came of it.

        Raises:
            ModelLoadingError, DrainingError, EngineDeadError: nothing is asked of the engine now.
            EngineDeadError: it died, or was stopped, before it answered.
            UnavailableError: it did not answer in time; it may still do it.
            QuireError: it could not; the class is the engine's.
        """
        self._check_accepting()
        return await self._calls.ask(method, timeout_s)

    def _check_accepting(self) -> None:
        if self.death is not None:
            raise self._dead_error()
        if self._is_draining or self._is_stopping:
            raise DrainingError("The server is shutting down.", retry_after_s=DRAINING_RETRY_AFTER_S)
        if self.info is None:
            raise ModelLoadingError(
                f"The model is not ready yet (phase {self._readiness.phase}).", retry_after_s=LOADING_RETRY_AFTER_S
            )

    def _check_is_free(self, request_id: str) -> None:
        """Refuse an id under which outputs of another request may still come."""
        if request_id in self._open or request_id in self._closing:
            state = "running" if request_id in self._open else "being ended"
            raise InvalidRequestError(f"A request with id {request_id!r} is {state}.", param="request_id")

    def _abort_closed(self, request_id: str) -> None:
        self._begin_closing([request_id])

    def _begin_closing(self, request_ids: Iterable[str]) -> list[OutputStream]:
        """Tell the engine to end requests, and take them for ended; returns the streams of those that were open."""
        streams = [stream for request_id in request_ids if (stream := self._forget(request_id)) is not None]
        if streams:
            self._closing.update((stream.request_id, stream) for stream in streams)
            self._send(AbortRequests(request_ids=[stream.request_id for stream in streams]))
        return streams

    def _forget(self, request_id: str) -> OutputStream | None:
        stream = self._open.pop(request_id, None)
        if not self._open:
            self._none_open.set()
        return stream

    def _send(self, message: ToEngine) -> None:
        if self._sockets is not None and self.death is None:
            self._sockets.send(encode(message))

    # ---- messages ----

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, sockets: Sockets) -> None:
        while self.death is None:
            encoded = await sockets.receive()
            try:
                message = from_engine_decoder.decode(encoded)
            except msgspec.DecodeError as error:
                self._die(TerminationMessage(code="EngineFailed", stage="Serving", message=f"Bad message: {error}"))
                return
            self._dispatch(message)

    def _dispatch(self, message: FromEngine) -> None:
        self.last_heartbeat = time.monotonic()
        self._watchdog.hear()
        match message:
            case EngineStep():
                self._watchdog.hear(message.max_silence_s)
                self._on_engine_step(message)
            case EngineBusy():
                self._watchdog.hear(message.max_silence_s, message.reason)
            case Reply():
                self._calls.settle(message)
            case EngineProgress():
                self._readiness = Readiness(phase=message.phase, message=message.message, percent=message.percent)
            case EngineReady():
                self.info = message
                self._watchdog.is_awake = True
                self._readiness = Readiness(phase=Phase.READY)
                self._settled.set()
            case EngineFailed():
                self._die(message.message)

    def _on_engine_step(self, step: EngineStep) -> None:
        self.stats = step.stats
        for output in step.outputs:
            stream = self._open.get(output.request_id) or self._closing.get(output.request_id)
            if stream is None:
                continue
            stream.put(output)
            if stream.has_ended_in_engine:
                self._forget(output.request_id)
                self._closing.pop(output.request_id, None)
                self._limit.record_finish(time.monotonic())
        if self._on_step is not None:
            self._on_step(step)

    # ---- death ----

    def _watch_exit(self) -> None:
        try:
            self._exit_fd = os.pidfd_open(self._process.pid)
        except ProcessLookupError:  # already reaped
            self._spawn(self._on_exit())
            return
        asyncio.get_running_loop().add_reader(self._exit_fd, self._on_exit_event)

    def _unwatch_exit(self) -> None:
        if self._exit_fd is not None:
            asyncio.get_running_loop().remove_reader(self._exit_fd)
            os.close(self._exit_fd)
            self._exit_fd = None

    def _on_exit_event(self) -> None:
        self._unwatch_exit()
        self._spawn(self._on_exit())

    async def _on_exit(self) -> None:
        if not self._is_stopping:
            await asyncio.sleep(LAST_WORDS_S)  # its last words may still be in the socket
            self._die(_describe_exit(self._process.exit_code or 0, self.info is not None))

    async def _watch_heartbeat(self) -> None:
        while not self._watchdog.tick(self._tick_s):
            await asyncio.sleep(self._tick_s)
        self._die(TerminationMessage(code="EngineHung", stage="Serving", message=self._watchdog.verdict))

    def _die(self, message: TerminationMessage) -> None:
        if self.death is not None or self._is_stopping:
            return
        self.death = message
        for stream in self._open.values():
            stream.fail(self._dead_error())
        self._open.clear()
        self._closing.clear()
        self._calls.fail(self._dead_error)
        self._none_open.set()
        self._settled.set()
        self.died.set()

    def _dead_error(self) -> EngineDeadError:
        if self.death is None:
            return EngineDeadError("The engine was stopped.")
        return EngineDeadError(f"The engine is dead: {self.death.message}")


def _describe_exit(exit_code: int, was_ready: bool) -> TerminationMessage:
    stage = "Serving" if was_ready else "Loading"
    if exit_code == -signal.SIGKILL:
        return TerminationMessage(
            code="EngineKilled",
            stage=stage,
            message="The engine process was killed (SIGKILL), most often for its memory.",
            hint="Raise the memory limit, or lower --gpu-memory-utilization or --max-model-len.",
        )
    how = f"was ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exited with code {exit_code}"
    return TerminationMessage(code="EngineDied", stage=stage, message=f"The engine process {how}; its log says why.")
