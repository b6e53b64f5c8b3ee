"""The gateway as a process of its own: `quire gateway --config FILE`.

Owns its life: the port, the signals, the end. SIGTERM closes the port and lets running requests finish for as long as
`--shutdown-timeout` says; a second signal ends them. Knows nothing of what a request is.
"""

import argparse
import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
import uvloop

from quire_contract import ports
from quire_gateway.app import Gateway
from quire_gateway.backends import StaticBackends
from quire_gateway.config import ConfigError, load_models

EXIT_FAILED = 1
EXIT_USAGE = 2
POLL_S = 0.01

logger = logging.getLogger("quire_gateway")


def main(words: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Exit codes: 0 stopped, 1 the port cannot be had, 2 a bad file or flag."""
    arguments = _build_parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    backends = StaticBackends()
    try:
        models = load_models(arguments.config)
    except ConfigError as error:
        print(f"quire gateway: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        listener = _listen(arguments.host, arguments.port)
    except OSError as error:
        print(f"quire gateway: {arguments.host}:{arguments.port}: {error}", file=sys.stderr)
        return EXIT_FAILED
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for model in models:
            backends.set(model)
        runner.run(_serve(Gateway(backends), listener, len(models), arguments.shutdown_timeout))
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quire gateway", description="Route OpenAI requests to replicas.", allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML: models with their names and backends")
    parser.add_argument("--host", default="0.0.0.0", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=ports.parse_port, default=ports.GATEWAY_HTTP, help="port (default: %(default)s)")
    parser.add_argument(
        "--shutdown-timeout",
        type=int,
        default=120,
        help="seconds for running requests to finish (default: %(default)s)",
    )
    return parser


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


async def _serve(gateway: Gateway, listener: socket.socket, num_models: int, shutdown_timeout_s: int) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            gateway,
            loop="none",
            http="httptools",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=shutdown_timeout_s,
        )
    )
    serving = asyncio.create_task(server.serve([listener]))
    # uvicorn's own handlers, which end the process by the signal, are installed when it starts: ours after those.
    while not server.started and not serving.done():
        await asyncio.sleep(POLL_S)

    def stop(number: int) -> None:
        logger.info("%s: %s", signal.Signals(number).name, "ending" if server.should_exit else "no new requests")
        server.force_exit = server.should_exit
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    host, port = listener.getsockname()[:2]
    logger.info("listening on %s:%d, models=%d", f"[{host}]" if ":" in host else host, port, num_models)
    await serving


if __name__ == "__main__":
    sys.exit(main())
