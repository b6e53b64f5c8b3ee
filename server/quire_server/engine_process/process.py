"""The engine process, as a command (`python -m`), started by the API process (`engine.border.launch`).

Owns the process: its sockets, its imports and its end. Takes no message (`engine.border.loop`), decides nothing about
requests (`engine.core`) and computes nothing (`runner`). Life: EngineProgress… → EngineReady → one EngineStep per step,
and one a second when there is nothing to do → exit 0 on Shutdown. A failure at any moment is logged, written as the
termination message, sent as EngineFailed, and ends the process with status 1.
"""

import contextlib
import errno
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import traceback

import zmq

from quire_contract.phases import Phase
from quire_contract.termination import TerminationMessage, write_termination
from quire_server.engine.border.launch import receive_launch
from quire_server.engine.border.loop import EngineLoop
from quire_server.engine.border.messages import EngineFailed, EngineProgress, FromEngine, encode
from quire_server.shared.config import EngineConfig
from quire_server.shared.errors import StartupError
from quire_server.shared.logs import configure_logging

logger = logging.getLogger(__name__)

SPIN_COUNT = "10000"
"""How long a thread that waits for the others spins before it sleeps. libgomp's 300000 is no faster on idle CPUs; where
another process takes one of them, each of a step's hundreds of barriers then lasts as long as that process may run:
measured with a busy neighbour on 2 CPUs, 600 ms for a step of 11 ms, and 55 ms with this."""
_LAST_WORDS_MS = 2000


class EngineSockets:
    """Both ends of the bridge, as this process has them. Messages are never dropped."""

    def __init__(self, to_engine: str, from_engine: str) -> None:
        self._context = zmq.Context()
        self._receiver = self._context.socket(zmq.PULL)
        self._sender = self._context.socket(zmq.PUSH)
        for socket, address in ((self._receiver, to_engine), (self._sender, from_engine)):
            socket.set_hwm(0)
            socket.connect(address)

    def send(self, message: FromEngine) -> None:
        self._sender.send(encode(message))

    def receive(self, timeout_ms: int) -> list[bytes]:
        """As `engine.border.loop.Wire` has it."""
        frames: list[bytes] = []
        if timeout_ms > 0 and not self._receiver.poll(timeout_ms):
            return frames
        while True:
            try:
                frames.append(self._receiver.recv(zmq.NOBLOCK))
            except zmq.Again:
                return frames

    def close(self) -> None:
        """Close; what was sent still goes out, for a moment."""
        self._receiver.close(linger=0)
        self._sender.close(linger=_LAST_WORDS_MS)
        self._context.term()


def run_engine(config: EngineConfig, to_engine: str, from_engine: str) -> int:
    """Serve until Shutdown or a failure. Returns the exit status of the process."""
    sockets = EngineSockets(to_engine, from_engine)
    stage = "Loading"
    try:
        sockets.send(EngineProgress(phase=Phase.STARTING, message="Importing"))
        from quire_server.engine_process.startup import (
            start_engine,  # torch: after the parent knows that this process lives
        )

        imported_seconds = {"import": round(_process_age_seconds(), 4)}
        engine = start_engine(config, on_progress=sockets.send, earlier_seconds=imported_seconds)
        stage = "Serving"
        gc.freeze()  # what was made so far lives until the end: 50 ms that no collection takes out of a step
        gc.enable()
        sockets.send(engine.info)
        EngineLoop(engine.core, sockets, engine.info).run()
    except StartupError as error:
        logger.error("%s%s", error, f" {error.termination.hint}" if error.termination.hint else "")
        return _fail(sockets, error.termination)
    except Exception as error:  # noqa: BLE001 - the one place where every failure ends
        logger.critical("The engine failed:\n%s", traceback.format_exc())
        return _fail(sockets, _describe(error, stage))
    sockets.close()
    return 0


def _describe(error: Exception, stage: str) -> TerminationMessage:
    # torch's allocator raises a plain RuntimeError on a CPU, and a subclass of it named so on a GPU.
    is_memory = (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "OutOfMemory" in type(error).__name__
        or "can't allocate memory" in str(error)
    )
    return TerminationMessage(
        code="OutOfMemory" if is_memory else "EngineFailed",
        stage=stage,
        message=f"{type(error).__name__}: {error}",
        hint="Raise the memory limit, or lower --max-num-batched-tokens or --max-model-len." if is_memory else "",
    )


def _fail(sockets: EngineSockets, message: TerminationMessage) -> int:
    write_termination(message)
    sockets.send(EngineFailed(message))
    sockets.close()
    return 1


def _process_age_seconds() -> float:
    """Seconds since this process was made, interpreter start included."""
    with open("/proc/self/stat", encoding="ascii") as stat, open("/proc/uptime", encoding="ascii") as uptime:
        start_ticks = int(stat.read().rpartition(")")[2].split()[19])
        return float(uptime.read().split()[0]) - start_ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run the process from its first instruction to its last."""
    gc.disable()  # until the engine is ready: imports and loading make much and drop little
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the API process decides when to end
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    threading.Thread(target=_import_ahead, name="import", daemon=True).start()
    launch = receive_launch()
    configure_logging(launch.config.log_format, launch.config.log_level)
    status = run_engine(launch.config, launch.to_engine, launch.from_engine)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # the parent watch holds stdin's lock, and there is nothing to clean up


def _import_ahead() -> None:
    """Import torch while the parent is still finding out what to serve. A failure comes up again in `run_engine`."""
    with contextlib.suppress(ImportError):
        importlib.import_module("quire_server.engine_process.startup")


if __name__ == "__main__":
    main()
