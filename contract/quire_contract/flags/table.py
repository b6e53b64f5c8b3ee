"""Every flag of `quire serve`: its name, what it may hold and what it is for. vLLM's other flags are in `vllm.py`.

Defaults are None, because the configuration has its own. Limits stand here, where both the server's command line and
whoever writes one for it (the operator) meet them; limits that lie across flags are the configuration's.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar, get_args

from quire_contract import ports, units
from quire_contract.flags.errors import FlagError
from quire_contract.nesting import bounded_nesting
from quire_contract.units import UnitError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
SchedulingPolicy = Literal["fcfs", "priority"]

_DTYPE_ALIASES: Final = {"half": "float16", "float": "float32"}
_Value = TypeVar("_Value", int, float)


class FlagParser(argparse.ArgumentParser):
    """A parser that knows whole names only, and says in one line what is wrong, where argparse lists sixty flags first.

    Raises:
        FlagError: instead of ending the process.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise FlagError(message.removeprefix("argument "))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model and every flag of `quire serve`."""
    parser.add_argument(
        "model", nargs="?", help="directory, .gguf file, file:// URI, hf://org/name[/file.gguf] or org/name"
    )
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags; the command line wins")
    _add_model_flags(parser.add_argument_group("model"))
    _add_engine_flags(parser.add_argument_group("engine"))
    _add_server_flags(parser.add_argument_group("server"))


def parse_size(text: str) -> int:
    """Return a number that may end in k, m, g, t (powers of 1000) or K, M, G, T (powers of 1024)."""
    try:
        return units.parse_size(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_max_model_len(text: str) -> int | None:
    """`auto` and -1 mean: what the model allows and the memory holds."""
    return None if text in ("auto", "-1") else _at_least(1)(text)


def parse_list(text: str) -> list[str]:
    """One value, or a JSON list of them."""
    if not text.startswith("["):
        return [text]
    try:
        with bounded_nesting():
            return [str(value) for value in json.loads(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list: {error}") from None


def _add_model_flags(group: Any) -> None:
    group.add_argument("--served-model-name", nargs="+", action="extend", help="names clients may use; default: MODEL")
    group.add_argument("--revision", help="branch, tag or commit of a repository")
    group.add_argument("--download-dir", type=Path, help="cache of downloaded files; default: $HF_HOME")
    group.add_argument("--hf-token", help="token for gated repositories; default: $HF_TOKEN")
    group.add_argument("--tokenizer", help="directory or .gguf file of another tokenizer")
    group.add_argument("--dtype", type=_dtype, help="auto, bfloat16, float16 (half) or float32 (float)")
    group.add_argument("--max-model-len", type=parse_max_model_len, help="longest context; default: the model's")
    group.add_argument("--seed", type=int, help="seed of requests that have none")
    group.add_argument(
        "--generation-config", choices=["auto", "vllm"], help="auto: the model's sampling defaults; vllm: neutral ones"
    )
    group.add_argument("--chat-template", help="file with a Jinja template, or the template itself")


def _add_engine_flags(group: Any) -> None:
    switch = argparse.BooleanOptionalAction
    policies = get_args(SchedulingPolicy)
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where the model runs")
    group.add_argument("--num-threads", type=_at_least(1), help="CPU threads; default: the CPU quota of this process")
    group.add_argument("--block-size", type=_power_of_two, help="tokens in a block of the KV cache")
    group.add_argument("--gpu-memory-utilization", type=_share, help="share of the memory for weights and KV cache")
    group.add_argument("--kv-cache-memory-bytes", type=_at_least(1), help="size of the KV cache, instead of a share")
    group.add_argument("--num-gpu-blocks-override", type=_at_least(2), help="number of blocks, instead of a size")
    group.add_argument("--enable-prefix-caching", action=switch, help="keep and share the KV of equal prefixes")
    group.add_argument("--max-num-batched-tokens", type=_at_least(1), help="tokens in a step")
    group.add_argument("--max-num-seqs", type=_at_least(1), help="requests in a step")
    group.add_argument("--enable-chunked-prefill", action=switch, help="compute long prompts over several steps")
    group.add_argument("--long-prefill-token-threshold", type=_at_least(0), help="most tokens of one prompt in a step")
    group.add_argument("--scheduling-policy", choices=policies, help="who runs first")
    group.add_argument("--async-scheduling", action=switch, help="schedule a step before the last has ended")
    group.add_argument("--max-num-queued-reqs", type=_at_least(1), help="requests that may wait; more get 429")


def _add_server_flags(group: Any) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--host", help="address to listen on; default: all")
    group.add_argument("--port", type=_port, help=f"default: {ports.SERVER_HTTP}; 0: a free one, which is logged")
    group.add_argument("--fd", type=_at_least(0), help="inherited listening socket, instead of --host and --port")
    group.add_argument("--api-key", type=_key, nargs="+", action="extend", help="keys of clients; or $QUIRE_API_KEY")
    group.add_argument("--allowed-origins", type=parse_list, nargs="+", action="extend", help="for browsers (CORS)")
    group.add_argument("--max-request-body-bytes", type=_at_least(1), help="larger bodies are refused (16M)")
    group.add_argument("--response-role", help="role of answers")
    group.add_argument("--enable-request-id-headers", action=switch, help="put X-Request-Id on responses")
    group.add_argument("--enable-force-include-usage", action=switch, help="every chunk of a stream has the usage")
    group.add_argument("--strict-fields", action=switch, help="refuse request fields that are not known")
    group.add_argument("--shutdown-timeout", type=_seconds, metavar="SECONDS", help="for running requests at SIGTERM")
    group.add_argument(
        "--engine-heartbeat-timeout", type=_some_seconds, metavar="SECONDS", help="longest silence of the engine"
    )
    group.add_argument("--log-format", choices=["plain", "json"], help="how log lines look")
    group.add_argument("--log-level", type=str.lower, choices=["debug", "info", "warning", "error", "critical"])
    group.add_argument("--disable-log-stats", action=switch, help="no line about throughput every ten seconds")
    group.add_argument("--enable-log-requests", action=switch, help="a line per request")
    group.add_argument("--disable-uvicorn-access-log", action=switch, help="no line per HTTP request")
    group.add_argument("--disable-access-log-for-endpoints", help="paths without such a line; default: the probes")


def _limited(parse: Callable[[str], _Value], is_usable: Callable[[_Value], bool], rule: str) -> Callable[[str], _Value]:
    """Return a reader of one flag's value that refuses what breaks a rule."""

    def read(text: str) -> _Value:
        value = parse(text)
        if not is_usable(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text}")
        return value

    return read


def _at_least(minimum: int) -> Callable[[str], int]:
    return _limited(parse_size, lambda value: value >= minimum, f"at least {minimum}")


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


_port = _limited(parse_size, lambda value: 0 <= value <= 65535, "in [0, 65535]")
_power_of_two = _limited(parse_size, lambda value: value > 0 and value & (value - 1) == 0, "a power of two")
_share = _limited(_parse_number, lambda value: 0 < value <= 1, "above 0 and at most 1")
_seconds = _limited(_parse_number, lambda value: value >= 0, "at least 0")
_some_seconds = _limited(_parse_number, lambda value: value > 0, "above 0")


def _key(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _dtype(text: str) -> str:
    name = _DTYPE_ALIASES.get(text, text)
    if name not in get_args(Dtype):
        known = ", ".join((*get_args(Dtype), *_DTYPE_ALIASES))
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
    return name
