"""What arguments mean to the server, without a server: for whoever writes a command line for one."""

import argparse
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from quire_contract.flags.table import FlagParser, add_flags
from quire_contract.flags.vllm import take_compat_flags, with_dashes


def read_flags(arguments: Sequence[str]) -> Mapping[str, Any]:
    """Return the values of the flags in `arguments`, which follow a model: of each its last, and none that is absent.

    `--config` is not read: it names a file of another machine.

    Raises:
        FlagError: the server would refuse to start with them.
    """
    kept, _ = take_compat_flags([with_dashes(token) for token in arguments])
    found = vars(_parser().parse_args(["model", *kept]))
    return {name: value for name, value in found.items() if name != "model"}


@cache
def _parser() -> argparse.ArgumentParser:
    """Make a parser without --help, which would print it, and with nothing for what is not given."""
    parser = FlagParser(add_help=False, argument_default=argparse.SUPPRESS)
    add_flags(parser)
    return parser
