"""`quire operator`: its command line, and the end of its process. Knows no part but `process.py`, which it runs.

The exit codes: 0 stopped as asked, 1 failed (Kubernetes starts it anew), 2 wrong arguments or unusable settings.
"""

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Final

from quire_contract import ports
from quire_contract.units import UnitError, parse_duration
from quire_operator.process import logs

DEFAULT_CONFIG: Final = Path("/etc/quire/operator.yaml")
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `quire operator`."""
    parser.add_argument(
        "--config",
        type=Path,
        help=f"settings file, read again when it changes (default: {DEFAULT_CONFIG} if there is one)",
    )
    for name, default, paths in (
        ("--health-port", ports.OPERATOR_HEALTH, "/livez and /readyz"),
        ("--metrics-port", ports.OPERATOR_METRICS, "/metrics"),
    ):
        about = f"of {paths} (default: {default}; 0: a free one, which is logged)"
        parser.add_argument(name, type=ports.parse_port, default=default, metavar="PORT", help=about)
    parser.add_argument("--workers", type=_positive, default=8, metavar="N", help="reconciles at a time (default: 8)")
    parser.add_argument("--no-leader-election", action="store_true", help="work without a Lease: the only operator")
    parser.add_argument("--lease-namespace", metavar="NAMESPACE", help="default: the namespace this runs in")
    parser.add_argument("--lease-duration", type=_lease_duration, default=15.0, metavar="TIME", help="default: 15s")
    parser.add_argument("--identity", help="this process's name in the Lease (default: $POD_NAME, or the host's name)")
    parser.add_argument("--log-format", choices=logs.FORMATS, default=logs.PLAIN)


def run(arguments: argparse.Namespace) -> int:
    """Run the operator until a signal; return the exit code."""
    logs.set_up_logging(arguments.log_format)
    # Not before the arguments are known to be right: kopf and the client take half a second.
    from quire_kube.connection import ConnectionSettingsError
    from quire_operator.process.process import OperatorOptions, OperatorProcess, own_namespace
    from quire_operator.process.settings_file import SettingsFile
    from quire_operator.spec.settings import SettingsError

    config = arguments.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    options = OperatorOptions(
        config=config,
        health_port=arguments.health_port,
        metrics_port=arguments.metrics_port,
        lease_namespace=arguments.lease_namespace or own_namespace(),
        identity=arguments.identity or os.environ.get("POD_NAME") or socket.gethostname(),
        has_leader_election=not arguments.no_leader_election,
        lease_duration_s=arguments.lease_duration,
        num_workers=arguments.workers,
    )

    async def main() -> int:
        return await OperatorProcess(options, SettingsFile(config)).run()

    try:
        return _run_to_the_end(main)
    except (SettingsError, ConnectionSettingsError) as error:
        print(f"quire operator: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"quire operator: {error}", file=sys.stderr)
        return EXIT_FAILED


def _run_to_the_end(main: Callable[[], Coroutine[None, None, int]]) -> int:
    """Run it; and where something does not end by itself even then, end the process."""
    with asyncio.Runner() as runner:
        exit_code = runner.run(main())
        if exit_code != 0 and any(not task.done() for task in asyncio.all_tasks(runner.get_loop())):
            logging.shutdown()
            os._exit(exit_code)
        return exit_code


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _lease_duration(text: str) -> float:
    try:
        value = parse_duration(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1s or more")
    return value


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m quire_operator", description=__doc__, allow_abbrev=False)
    add_arguments(_parser)
    sys.exit(run(_parser.parse_args()))
