"""The `quire` command. Each subcommand is a module of its own, imported only when it is asked for.

A subcommand's module has `add_arguments(parser)` and `run(arguments) -> exit code`, or, where it parses its words
itself, `main(words) -> exit code`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple


class Command(NamedTuple):
    module: str
    help: str


COMMANDS: Final = {
    "serve": Command("quire_cli.serve", "serve one model over HTTP (the OpenAI API)"),
    "up": Command("quire_cli.up", "run an LLMDeployment as local processes, with no cluster"),
    "operator": Command("quire_cli.operator", "run the Kubernetes operator"),
    "gateway": Command("quire_gateway.__main__", "route OpenAI requests to replicas"),
    "download": Command("quire_cli.download", "bring a model into a volume, verified and complete"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        _build_overview().parse_args(words or ["--help"])  # exits, with help or with what is wrong
        return 2
    name, *rest = words
    command = COMMANDS[name]
    exit_code: int = _run(importlib.import_module(command.module), name, rest)
    return exit_code


def _run(module: Any, name: str, words: Sequence[str]) -> Any:
    if hasattr(module, "main"):
        return module.main(words)
    parser = argparse.ArgumentParser(prog=f"quire {name}", description=module.__doc__, allow_abbrev=False)
    module.add_arguments(parser)
    return module.run(parser.parse_args(words))


def _build_overview() -> argparse.ArgumentParser:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(prog="quire", description="Large language models on Kubernetes, or right here.")
    parser.add_argument("--version", action="version", version=f"quire {version('quire')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
