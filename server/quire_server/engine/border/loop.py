"""The engine's loop: drains the inbox, steps, and sends what came of it.

Owns what may go wrong between two steps. Decides nothing about requests (`core`), and knows sockets as a `Wire` alone.

Invariants: every request and call that has come with a readable id is answered exactly once; nothing that a message
holds, and no bug met while a request or a call is taken, ends the loop. What a step raises does, as does a bug in an
abort, which may leave the scheduler half done, and an error after which this process or its device can do nothing more.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

from quire_server.engine.border.calls import Call, EngineMethod, Reply, ResetPrefixCache
from quire_server.engine.border.messages import (
    AbortRequests,
    AddRequest,
    EngineBusy,
    EngineReady,
    EngineStep,
    FromEngine,
    Shutdown,
    ToEngine,
    to_engine_decoder,
)
from quire_server.engine.border.validation import validate_request
from quire_server.engine.core import EngineCore
from quire_server.engine.output import EngineCoreOutput, SchedulerStats
from quire_server.engine.request import EngineRequest
from quire_server.shared.errors import InternalError, InvalidRequestError, QuireError

logger = logging.getLogger(__name__)

HEARTBEAT_MS = 1000
STALLED_MS = 10
"""How long to wait, unless a message comes, where nobody can run before something outside has happened."""
_FATAL_NAMES: Final = frozenset({"AcceleratorError"})
"""torch's, for a device that answers nothing any more; by name, since torch is not known here."""

METHODS: Final[Mapping[type[EngineMethod[Any]], Callable[[EngineCore, Any], object]]] = {
    ResetPrefixCache: lambda core, method: core.reset_prefix_cache(),
}
"""How each method is done, between two steps."""


class Wire(Protocol):
    """The engine's end of the bridge."""

    def send(self, message: FromEngine) -> None: ...

    def receive(self, timeout_ms: int) -> list[bytes]:
        """Return what has come; waits for the first message for at most `timeout_ms`."""
        ...


class EngineLoop:
    """Takes messages and steps, until it is told to end."""

    def __init__(self, core: EngineCore, wire: Wire, info: EngineReady) -> None:
        self._core = core
        self._wire = wire
        self._info = info
        self._refusals: list[EngineCoreOutput] = []
        self._max_silence_s = 0.0  # what the last message said
        self._last_step: tuple[float, SchedulerStats] | None = None  # when (monotonic), and what it said
        self._is_stopping = False

    def run(self) -> None:
        """Return after Shutdown. Whatever the runner raises is passed on: the engine cannot go on."""
        while not self._is_stopping:
            for frame in self._wire.receive(self._patience_ms()):
                self._take(frame)
            self._step()

    def _patience_ms(self) -> int:
        """How long to wait for a message before the next step."""
        if self._refusals:
            return 0
        if not self._core.has_unfinished:
            return HEARTBEAT_MS
        return STALLED_MS if self._core.is_stalled else 0

    def _step(self) -> None:
        outputs, self._refusals = self._refusals, []
        now = time.time()
        if self._core.has_unfinished:
            if self._max_silence_s < self._info.max_step_s:
                self._say(EngineBusy(reason="a step", max_silence_s=self._info.max_step_s))
            outputs += self._core.step(now)
        stats = self._core.stats()
        is_waiting = self._core.has_unfinished and self._core.is_stalled
        if outputs or not is_waiting or self._has_news(stats):
            max_silence_s = self._info.max_step_s if self._core.has_unfinished else 0.0
            self._say(EngineStep(outputs=outputs, stats=stats, time=now, max_silence_s=max_silence_s))
            self._last_step = (time.monotonic(), stats)

    def _has_news(self, stats: SchedulerStats) -> bool:
        """Whether a loop that only looks whether it can go on has something to say: numbers, or that it lives."""
        if self._last_step is None:
            return True
        said_at, said = self._last_step
        return stats != said or time.monotonic() >= said_at + HEARTBEAT_MS / 1000

    def _say(self, message: EngineBusy | EngineStep | Reply) -> None:
        self._max_silence_s = 0.0 if isinstance(message, Reply) else message.max_silence_s
        self._wire.send(message)

    def _take(self, frame: bytes) -> None:
        try:
            message = to_engine_decoder.decode(frame)
        except Exception as error:  # noqa: BLE001 - whatever a frame holds, and whatever the check of a field raises
            self._refuse_frame(frame, _typed(error, "a message could not be read"))
        else:
            self._handle(message)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case AddRequest(request):
                self._add(request)
            case AbortRequests(request_ids):
                self._core.abort_requests(request_ids)
            case Call():
                self._answer(message)
            case Shutdown():
                self._is_stopping = True

    def _add(self, request: EngineRequest) -> None:
        try:
            validate_request(request, self._info.vocab_size)
            self._core.add_request(request)
        except Exception as error:  # noqa: BLE001 - a bug met on one request is the end of that one alone
            self._refuse(request.request_id, _typed(error, f"request_id={request.request_id} could not be taken"))

    def _answer(self, call: Call) -> None:
        try:
            result = METHODS[type(call.method)](self._core, call.method)
            reply = Reply.succeeded(call.call_id, result)
        except Exception as error:  # noqa: BLE001 - as with a request
            reply = Reply.failed(call.call_id, _typed(error, f"{type(call.method).__name__} failed"))
        self._say(reply)

    def _refuse(self, request_id: str, error: QuireError) -> None:
        logger.warning("Refused request_id=%s: %s", request_id, error)
        self._refusals.append(EngineCoreOutput.failed(request_id, error))

    def _refuse_frame(self, frame: bytes, error: QuireError) -> None:
        """Tell whoever sent a message that is not well-formed, where it can be read who that was."""
        kind, owner = _find_owner(frame)
        if kind == AddRequest.__name__ and isinstance(owner, str):
            self._refuse(owner, error)
        elif kind == Call.__name__ and type(owner) is int:
            self._say(Reply.failed(owner, error))
        else:
            logger.warning("Dropped a message that names nobody: %s", error)


def _typed(error: Exception, what: str) -> QuireError:
    """Return the error that a client hears of.

    Raises:
        Exception: the error itself, where the engine cannot go on after it.
    """
    if isinstance(error, MemoryError) or type(error).__name__ in _FATAL_NAMES:
        raise error
    if isinstance(error, QuireError):
        return error
    if isinstance(error, msgspec.DecodeError | UnicodeDecodeError):
        return InvalidRequestError(f"The message to the engine is malformed: {error}")
    logger.error("A bug: %s", what, exc_info=error)
    return InternalError("Something went wrong inside the engine; its log says what.")


def _find_owner(frame: bytes) -> tuple[object, object]:
    """Return a message's kind, and its request's id or its call's, as far as they can be read."""
    try:
        message = msgspec.msgpack.decode(frame)
        kind = message["type"]
        return kind, message["call_id"] if kind == Call.__name__ else message["request"]["request_id"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):  # msgspec's and Unicode's are ValueErrors
        return None, None
