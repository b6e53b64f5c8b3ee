"""`quire up -f FILE`: an LLMDeployment as local processes, with no cluster."""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from quire_contract import ports


def cache_home() -> Path:
    """Where models and logs are kept: $QUIRE_HOME, else the user's cache directory."""
    named = os.environ.get("QUIRE_HOME")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quire"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--filename", type=Path, required=True, help="manifest with one or more LLMDeployments")
    parser.add_argument("--host", default="127.0.0.1", help="the gateway's address (default: %(default)s)")
    parser.add_argument("--port", type=ports.parse_port, default=ports.GATEWAY_HTTP, help="port (default: %(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=None, help="where models are kept (default: ~/.cache/quire)")
    parser.add_argument("--watch", action="store_true", help="apply the file again whenever it changes")


def run(arguments: argparse.Namespace) -> int:
    """Run until Ctrl-C. Exit codes: 0 stopped, 1 could not start, 2 bad manifest."""
    from quire_cli.local.console import Console
    from quire_cli.local.runtime import ManifestError, Runtime, UpOptions
    from quire_server.shared.abandonable import leave

    home: Path = arguments.cache_dir or cache_home()
    options = UpOptions(
        file=arguments.filename,
        host=arguments.host,
        port=arguments.port,
        cache=home / "models",
        logs=home / "logs",
        watch=arguments.watch,
    )
    options.logs.mkdir(parents=True, exist_ok=True)
    options.cache.mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(Runtime(options, Console()).run())
    except ManifestError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"quire up: {options.host}:{options.port}: {error}", file=sys.stderr)
        return 1
    return leave(0)
