"""Serve one model over HTTP: the OpenAI API, metrics and probes. Flags have vLLM's names."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from quire_contract.termination import write_termination
from quire_server.api_process.arguments import add_arguments, build_serve_arguments, rewrite_arguments
from quire_server.api_process.serve import run
from quire_server.shared.errors import ConfigError

EXIT_USAGE = 2


def main(words: Sequence[str]) -> int:
    """Parse the words after `quire serve`, and serve. Exit codes: 0 stopped, 1 failed, 2 wrong arguments."""
    parser = _Parser(prog="quire serve", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    try:
        rewritten, warnings = rewrite_arguments(words)
        arguments = build_serve_arguments(parser.parse_args(rewritten), warnings)
    except ConfigError as error:
        print(f"quire serve: {error} {error.termination.hint}".rstrip(), file=sys.stderr)
        write_termination(error.termination)
        return EXIT_USAGE
    exit_code = run(arguments)
    from quire_server.shared.abandonable import leave  # not before the port is open: it needs asyncio

    return leave(exit_code)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, where argparse would list sixty flags first."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.", stage="Starting", hint="`quire serve --help` lists the flags.")
