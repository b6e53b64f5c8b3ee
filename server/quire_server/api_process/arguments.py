"""The command line of `quire serve`: vLLM's flags, composed into a `ServerConfig` and a `ModelSource`.

Dashes and underscores are the same; booleans have `--no-x`; sizes may be written 1k (1000) or 1K (1024); `--config
FILE` holds the same flags as YAML, and the command line wins over it.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from quire_contract import paths, ports, units
from quire_contract.nesting import bounded_nesting
from quire_contract.units import UnitError
from quire_server.api_process.arguments_compat import canonical_name, take_compat_flags
from quire_server.download.model_source import ModelSource, parse_model_source
from quire_server.shared.config import (
    CacheConfig,
    Dtype,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SchedulingPolicy,
    ServerConfig,
)
from quire_server.shared.errors import ConfigError

API_KEY_VARIABLES = ("QUIRE_API_KEY", "VLLM_API_KEY")
PROBE_PATHS = (paths.LIVEZ, paths.READYZ, paths.HEALTH, paths.METRICS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeArguments:
    """What one command line asks for."""

    config: ServerConfig
    """Its model path is where the files are, or will be once `source` is resolved."""
    source: ModelSource
    access_log: bool
    quiet_paths: tuple[str, ...]
    """Paths that the access log leaves out."""
    warnings: tuple[str, ...]
    """To be logged, once there is a log."""


def parse_size(text: str) -> int:
    """Return a number that may end in k, m, g, t (powers of 1000) or K, M, G, T (powers of 1024)."""
    try:
        return units.parse_size(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_max_model_len(text: str) -> int | None:
    """`auto` and -1 mean: what the model allows and the memory holds."""
    return None if text in ("auto", "-1") else parse_size(text)


def parse_list(text: str) -> list[str]:
    """One value, or a JSON list of them."""
    if not text.startswith("["):
        return [text]
    try:
        with bounded_nesting():
            return [str(value) for value in json.loads(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list: {error}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every flag of `quire serve`. Defaults are None: the configuration has its own."""
    parser.add_argument("model", nargs="?", help="directory, .gguf file, file:// URI, hf://org/name or org/name")
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags; the command line wins")
    _add_model_flags(parser.add_argument_group("model"))
    _add_engine_flags(parser.add_argument_group("engine"))
    _add_server_flags(parser.add_argument_group("server"))


def _add_model_flags(group: Any) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--served-model-name", nargs="+", action="extend", help="names clients may use; default: MODEL")
    group.add_argument("--revision", help="branch, tag or commit of a repository")
    group.add_argument("--download-dir", type=Path, help="cache of downloaded files; default: $HF_HOME")
    group.add_argument("--hf-token", help="token for gated repositories; default: $HF_TOKEN")
    group.add_argument("--tokenizer", help="directory or .gguf file of another tokenizer")
    group.add_argument("--skip-tokenizer-init", action=switch, help=argparse.SUPPRESS)
    group.add_argument("--dtype", type=_dtype, help="auto, bfloat16, float16 (half) or float32 (float)")
    group.add_argument("--max-model-len", type=parse_max_model_len, help="longest context; default: the model's")
    group.add_argument("--seed", type=int, help="seed of requests that have none")
    group.add_argument("--generation-config", help="auto: the model's sampling defaults; vllm: neutral ones")
    group.add_argument("--chat-template", help="file with a Jinja template, or the template itself")


def _add_engine_flags(group: Any) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where the model runs")
    group.add_argument("--num-threads", type=int, help="CPU threads; default: the CPU quota of this process")
    group.add_argument("--block-size", type=int, help="tokens in a block of the KV cache")
    group.add_argument("--gpu-memory-utilization", type=float, help="share of the memory for weights and KV cache")
    group.add_argument("--kv-cache-memory-bytes", type=parse_size, help="size of the KV cache, instead of a share")
    group.add_argument("--num-gpu-blocks-override", type=int, help="number of blocks, instead of a size")
    group.add_argument("--enable-prefix-caching", action=switch, help="keep and share the KV of equal prefixes")
    group.add_argument("--max-num-batched-tokens", type=parse_size, help="tokens in a step")
    group.add_argument("--max-num-seqs", type=parse_size, help="requests in a step")
    group.add_argument("--enable-chunked-prefill", action=switch, help="compute long prompts over several steps")
    group.add_argument("--long-prefill-token-threshold", type=parse_size, help="most tokens of one prompt in a step")
    group.add_argument("--scheduling-policy", choices=get_args(SchedulingPolicy), help="who runs first")
    group.add_argument("--async-scheduling", action=switch, help="schedule a step before the last has ended")
    group.add_argument("--max-num-queued-reqs", type=parse_size, help="requests that may wait; more get 429")


def _add_server_flags(group: Any) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--host", help="address to listen on; default: all")
    group.add_argument("--port", type=int, help=f"default: {ports.SERVER_HTTP}; 0: a free one, which is logged")
    group.add_argument("--fd", type=int, help="inherited listening socket to serve on, instead of --host and --port")
    group.add_argument("--api-key", nargs="+", action="extend", help="keys clients must present; or $QUIRE_API_KEY")
    group.add_argument("--allowed-origins", type=parse_list, nargs="+", action="extend", help="for browsers (CORS)")
    group.add_argument("--max-request-body-bytes", type=parse_size, help="larger bodies are refused (16M)")
    group.add_argument("--response-role", help="role of answers")
    group.add_argument("--enable-request-id-headers", action=switch, help="put X-Request-Id on responses")
    group.add_argument("--enable-force-include-usage", action=switch, help="every stream ends with its usage")
    group.add_argument("--shutdown-timeout", type=float, metavar="SECONDS", help="for running requests at SIGTERM")
    group.add_argument(
        "--engine-heartbeat-timeout", type=float, metavar="SECONDS", help="longest silence of the engine"
    )
    group.add_argument("--log-format", choices=["plain", "json"], help="how log lines look")
    group.add_argument("--log-level", type=str.lower, choices=["debug", "info", "warning", "error", "critical"])
    group.add_argument("--disable-log-stats", action=switch, help="no line about throughput every ten seconds")
    group.add_argument("--enable-log-requests", action=switch, help="a line per request")
    group.add_argument("--disable-uvicorn-access-log", action=switch, help="no line per HTTP request")
    group.add_argument("--disable-access-log-for-endpoints", help="paths without such a line; default: the probes")


def _dtype(text: str) -> str:
    name = {"half": "float16", "float": "float32"}.get(text, text)
    if name not in get_args(Dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(get_args(Dtype))}, half, float")
    return name


def rewrite_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments as the parser knows them, and warnings: file read, names with dashes, vLLM's others gone.

    Raises:
        ConfigError: the configuration file cannot be used, or a flag asks for what this server does not do.
    """
    arguments = [_with_dashes(token) for token in argv]
    arguments = _with_config_file(arguments)
    return take_compat_flags(arguments)


def _with_dashes(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, separator, value = token.partition("=")
    return name.replace("_", "-") + separator + value


def _with_config_file(arguments: list[str]) -> list[str]:
    """Put the flags of the file behind those of the command line, except where the command line has the same flag."""
    position = next((i for i, token in enumerate(arguments) if canonical_name(token) == "config"), None)
    if position is None or not arguments[position].startswith("--"):
        return arguments
    _, separator, file = arguments[position].partition("=")
    rest = arguments[:position] + arguments[position + (1 if separator else 2) :]
    if not separator:
        file = arguments[position + 1] if position + 1 < len(arguments) else ""
    given = {canonical_name(token).removeprefix("no-") for token in rest if token.startswith("--")}
    if rest and not rest[0].startswith("-"):
        given.add("model")
    for name, value in _read_config_file(Path(file)).items():
        flag = name.replace("_", "-")
        if flag.removeprefix("no-") not in given:
            rest += _as_tokens(flag, value)
    return rest


def _read_config_file(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        with bounded_nesting():
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {file}: cannot be read: {error}", stage="Starting") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {file}: must map flag names to values.", stage="Starting")
    return values


def _as_tokens(flag: str, value: Any) -> list[str]:
    match value:
        case True:
            return [f"--{flag}"]
        case False:
            return [f"--no-{flag}"]
        case None:
            return []
        case list():
            return [f"--{flag}", *map(str, value)]
        case dict():
            return [f"--{flag}={json.dumps(value)}"]
        case _:
            return [f"--{flag}={value}"]


def build_serve_arguments(
    arguments: argparse.Namespace, warnings: Sequence[str] = (), environment: Mapping[str, str] = os.environ
) -> ServeArguments:
    """Compose the configuration from parsed arguments.

    Raises:
        ConfigError: a value cannot work; the message names the flag.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    model = given.get("model") or given.get("model_flag")
    if model is None:
        raise ConfigError("No model: give a directory, a .gguf file, or a repository's name.", stage="Starting")
    source = parse_model_source(
        model, revision=given.get("revision"), cache_dir=given.get("download_dir"), token=given.get("hf_token")
    )
    engine = EngineConfig(
        model=_build_model(model, source, given),
        cache=CacheConfig(**_fields_of(CacheConfig, given)),
        scheduler=_build_scheduler(given),
        **_fields_of(EngineConfig, given),
    )
    excluded = given.get("disable_access_log_for_endpoints")
    return ServeArguments(
        config=_build_server(engine, given, environment),
        source=source,
        access_log=not given.get("disable_uvicorn_access_log", False),
        quiet_paths=PROBE_PATHS if excluded is None else tuple(path.strip() for path in excluded.split(",")),
        warnings=tuple(warnings),
    )


def _fields_of(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that have the names of a configuration's fields."""
    return {field.name: given[field.name] for field in fields(kind) if field.name in given and field.name != "model"}


def _build_model(model: str, source: ModelSource, given: Mapping[str, Any]) -> ModelConfig:
    if given.get("skip_tokenizer_init"):
        raise ConfigError("--skip-tokenizer-init is not supported by this server.", stage="Starting")
    generation_config = given.get("generation_config", "auto")
    if generation_config not in ("auto", "vllm"):
        raise ConfigError("--generation-config must be auto or vllm.", stage="Starting")
    tokenizer = given.get("tokenizer")
    if tokenizer is not None and tokenizer != model and not Path(tokenizer).exists():
        raise ConfigError(f"--tokenizer: {tokenizer}: no such file or directory.", stage="Starting")
    template = given.get("chat_template")
    return ModelConfig(
        model=model,
        path=source.path or Path(model),
        served_model_names=tuple(given.get("served_model_name") or [model]),
        tokenizer=Path(tokenizer) if tokenizer is not None and tokenizer != model else None,
        dtype=given.get("dtype", "auto"),
        max_model_len=given.get("max_model_len"),
        seed=given.get("seed", 0),
        generation_config=generation_config,
        chat_template=None if template is None else _read_chat_template(template),
    )


def _read_chat_template(text: str) -> str:
    """A file's name, or a template: only the latter has braces or line ends."""
    if any(mark in text for mark in ("{{", "{%", "\n")):
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template: {text}: cannot be read: {error}", stage="Starting") from error


def _build_scheduler(given: Mapping[str, Any]) -> SchedulerConfig:
    """Where one of the two step limits is given, the other's default gives way to it."""
    values = _fields_of(SchedulerConfig, given)
    if "scheduling_policy" in given:
        values["policy"] = given["scheduling_policy"]
    defaults = SchedulerConfig()
    if "max_num_batched_tokens" in values:
        values.setdefault("max_num_seqs", max(1, min(defaults.max_num_seqs, values["max_num_batched_tokens"])))
    elif "max_num_seqs" in values:
        values["max_num_batched_tokens"] = max(defaults.max_num_batched_tokens, values["max_num_seqs"])
    return SchedulerConfig(**values)


def _build_server(engine: EngineConfig, given: Mapping[str, Any], environment: Mapping[str, str]) -> ServerConfig:
    values = _fields_of(ServerConfig, given)
    keys = given.get("api_key") or [environment[name] for name in API_KEY_VARIABLES if environment.get(name)][:1]
    if "allowed_origins" in values:
        values["allowed_origins"] = tuple(origin for origins in values["allowed_origins"] for origin in origins)
    renamed = {"shutdown_timeout_s": "shutdown_timeout", "engine_heartbeat_timeout_s": "engine_heartbeat_timeout"}
    values |= {name: given[flag] for name, flag in renamed.items() if flag in given}
    if "enable_log_requests" in given:
        values["log_requests"] = given["enable_log_requests"]
    values["log_stats"] = not given.get("disable_log_stats", False)
    return ServerConfig(engine=engine, api_keys=tuple(keys), **values)
