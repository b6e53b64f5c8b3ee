"""The table of flags by which the operator judges extraArgs says what the server says. The judge is the server."""

from argparse import Action, ArgumentParser
from pathlib import Path

import pytest

from quire_contract.flags.errors import FlagError, UnservedFlagError
from quire_contract.flags.reading import read_flags
from quire_contract.flags.table import add_flags
from quire_contract.flags.vllm import COMPAT_FLAGS, SHORT_NAMES, canonical_name
from quire_server.api_process.arguments import parse_command_line
from quire_server.shared.errors import ConfigError

VALUES = ("", "0", "1", "3", "16", "-1", "0.5", "nan", "70000", "8k", "x", "auto", "json", '["a"]', "--help", "$(X)")
COMPAT_VALUES = ("1", "auto", "none", "x", "--help")
OF_THIS_MACHINE = {"model", "config", "chat-template", "tokenizer"}
"""Flags whose value is a file that only the server sees."""


def options() -> list[str]:
    parser = ArgumentParser(add_help=False)
    add_flags(parser)
    actions: list[Action] = parser._actions
    own = {name for action in actions for name in action.option_strings}
    switches = {f"--no-{name}" for name, flag in COMPAT_FLAGS.items() if flag.is_switch}
    return sorted(own | {f"--{name}" for name in COMPAT_FLAGS} | switches | set(SHORT_NAMES) | {"--no-such", "-h"})


def is_refused_by_server(model: Path, arguments: list[str]) -> bool:
    try:
        parse_command_line([str(model), *arguments], environment={})
    except (ConfigError, SystemExit):  # --help ends well, and serves nothing
        return True
    return False


def is_refused_by_table(arguments: list[str]) -> bool:
    try:
        read_flags(arguments)
    except FlagError:
        return True
    return False


@pytest.mark.parametrize("option", [name for name in options() if name.removeprefix("--") not in OF_THIS_MACHINE])
def test_what_the_table_refuses_the_server_refuses_and_nothing_else(option: str, tmp_path: Path) -> None:
    """Limits across flags (a step's tokens against its requests) are the configuration's, so each stands alone."""
    values = COMPAT_VALUES if option in SHORT_NAMES or canonical_name(option) in COMPAT_FLAGS else VALUES
    alone = [[option], [option, "a", "--no-such"], ["stray"]]
    for arguments in [*alone, *([option, value] for value in values), *([f"{option}={value}"] for value in values)]:
        assert is_refused_by_table(arguments) == is_refused_by_server(tmp_path, arguments), arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantization", "fp8"], "--quantization fp8 is not supported by this server; leave it out, or give 'auto'"),
        (["-tp", "2"], "--tensor-parallel-size 2 is not supported by this server; leave it out, or give '1'"),
        (["--enable-lora"], "--enable-lora is not supported by this server; leave it out"),
    ],
)
def test_what_is_vllms_and_not_ours_is_told_apart(arguments: list[str], message: str) -> None:
    with pytest.raises(UnservedFlagError) as caught:
        read_flags(arguments)
    assert str(caught.value) == message


def test_values_are_the_servers_and_the_last_one_counts() -> None:
    arguments = ["--max-num-seqs", "8", "--max_num_seqs=16", "--max-model-len", "auto", "--swap-space", "4"]
    assert read_flags(arguments) == {"max_num_seqs": 16, "max_model_len": None}
