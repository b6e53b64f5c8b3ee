"""`quire serve`: the API process from its first instruction to its last.

Order matters here: the port is bound first, so that `/readyz` can say what goes on; then the engine process is started,
so that it imports torch while this process imports its HTTP stack; then the model's files are fetched and loaded. This
process never imports torch.

Ends: SIGTERM or SIGINT drains (exit 0); a failed start or a dead engine ends it with the termination message written
(exit 1). A second signal ends the draining early.
"""

import logging
import signal
import socket
from types import FrameType

from quire_contract.termination import TerminationMessage, write_termination
from quire_server.api_process.arguments import ServeArguments
from quire_server.engine.border.launch import EngineProcess
from quire_server.shared.config import ServerConfig
from quire_server.shared.errors import ConfigError, StartupError
from quire_server.shared.logs import configure_logging

log = logging.getLogger(__name__)

BACKLOG = 2048


def run(arguments: ServeArguments) -> int:
    """Serve until told to end; return the exit code."""
    engine_config = arguments.config.engine
    configure_logging(
        engine_config.log_format,
        engine_config.log_level,
        access_log=arguments.access_log,
        excluded_paths=arguments.quiet_paths,
    )
    early_signals = _EarlySignals()
    for warning in arguments.warnings:
        log.warning("%s", warning)
    try:
        with _listen(arguments.config) as listener:
            early_signals.is_deferring = True
            process = EngineProcess()
            try:
                early_signals.release()
                return _run_loop(arguments, listener, process)
            finally:
                process.close()
    except StartupError as error:
        return fail(error.termination)


def _listen(config: ServerConfig) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the address cannot be had, or the inherited descriptor is of something else.
    """
    if config.fd is not None:
        return _take_over(config.fd)
    host, port = config.host, config.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    is_dual = family is socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}.", stage="Starting") from error


def _take_over(descriptor: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigError(f"--fd {descriptor}: not a socket: {error.strerror}.", stage="Starting") from error
    is_tcp = listener.family in (socket.AF_INET, socket.AF_INET6) and listener.type is socket.SOCK_STREAM
    if not is_tcp or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()  # it may be stderr, where this is about to be said
        raise ConfigError(f"--fd {descriptor}: not a TCP socket that listens.", stage="Starting")
    listener.set_inheritable(False)
    return listener


def fail(message: TerminationMessage) -> int:
    """Say why the process ends; return its exit code."""
    log.error("%s: %s%s", message.code, message.message, f" {message.hint}" if message.hint else "")
    write_termination(message)
    return 1


class _EarlySignals:
    """SIGTERM and SIGINT until the event loop takes them over: the process leaves at once, nothing needs draining yet.

    While `is_deferring`, what is being made could not be cleaned up; a signal then counts at `release`.
    """

    def __init__(self) -> None:
        self.is_deferring = False
        self._has_come = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def release(self) -> None:
        """Leave now if a signal came while deferring; from here on each one counts when it comes."""
        self.is_deferring = False
        if self._has_come:
            raise SystemExit(0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._has_come = True
        if not self.is_deferring:
            raise SystemExit(0)


def _run_loop(arguments: ServeArguments, listener: socket.socket, process: EngineProcess) -> int:
    import asyncio  # after the engine was started: from here on the imports are heavy

    import uvloop

    from quire_server.api_process.serving import Serving

    async def serve() -> int:
        end = await Serving(arguments, listener, process).run()
        return 0 if end is None else fail(end)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve())
