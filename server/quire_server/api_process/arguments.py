"""The command line of `quire serve`, composed into a `ServerConfig` and a `ModelSource`.

Which flags there are, the contract says (`quire_contract.flags`), for the operator judges them too.

Dashes and underscores are the same; booleans have `--no-x`; sizes may be written 1k (1000) or 1K (1024); `--config
FILE` holds the same flags as YAML, and the command line wins over it.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quire_contract import paths
from quire_contract.flags.errors import FlagError
from quire_contract.flags.table import FlagParser, add_flags
from quire_contract.flags.vllm import canonical_name, take_compat_flags, with_dashes
from quire_contract.nesting import bounded_nesting
from quire_server.download.model_source import ModelSource, parse_model_source
from quire_server.shared.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
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


def parse_command_line(
    words: Sequence[str], *, description: str = "", environment: Mapping[str, str] = os.environ
) -> ServeArguments:
    """Read the words after `quire serve`.

    Raises:
        ConfigError: a flag is not known, or its value cannot work; the message names the flag.
    """
    parser = FlagParser(prog="quire serve", description=description)
    add_flags(parser)
    try:
        rewritten, warnings = rewrite_arguments(words)
        parsed = parser.parse_args(rewritten)
    except FlagError as error:
        raise ConfigError(f"{error}.", stage="Starting", hint="`quire serve --help` lists the flags.") from error
    return build_serve_arguments(parsed, warnings, environment)


def rewrite_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments as the parser knows them, and warnings: file read, names with dashes, vLLM's others gone.

    Raises:
        ConfigError: the configuration file cannot be used.
        FlagError: a flag asks for what this server does not do.
    """
    arguments = [with_dashes(token) for token in argv]
    arguments = _with_config_file(arguments)
    return take_compat_flags(arguments)


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
        generation_config=given.get("generation_config", "auto"),
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
