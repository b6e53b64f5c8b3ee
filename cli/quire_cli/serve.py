"""Serve one model over HTTP: the OpenAI API, metrics and probes. Flags have vLLM's names."""

import sys
from collections.abc import Sequence

from quire_contract.termination import write_termination
from quire_server.api_process.arguments import parse_command_line
from quire_server.api_process.serve import run
from quire_server.shared.errors import ConfigError

EXIT_USAGE = 2


def main(words: Sequence[str]) -> int:
    """Parse the words after `quire serve`, and serve. Exit codes: 0 stopped, 1 failed, 2 wrong arguments."""
    try:
        arguments = parse_command_line(words, description=__doc__)
    except ConfigError as error:
        print(f"quire serve: {error} {error.termination.hint}".rstrip(), file=sys.stderr)
        write_termination(error.termination)
        return EXIT_USAGE
    exit_code = run(arguments)
    from quire_server.shared.abandonable import leave  # not before the port is open: it needs asyncio

    return leave(exit_code)
