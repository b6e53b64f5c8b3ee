import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quire_contract.flags.table import add_flags, parse_list, parse_size
from quire_contract.flags.vllm import COMPAT_FLAGS, Fate
from quire_server.api_process.arguments import (
    PROBE_PATHS,
    ServeArguments,
    parse_command_line,
)
from quire_server.shared.config import ParallelConfig
from quire_server.shared.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    return str(tmp_path / "model")


def parse(*words: str, environment: Mapping[str, str] | None = None) -> ServeArguments:
    return parse_command_line(words, environment=environment or {})


def value_at(arguments: ServeArguments, path: str) -> Any:
    value: Any = arguments
    for name in path.split("."):
        value = getattr(value, name)
    return value


MODEL = "config.engine.model"
CACHE = "config.engine.cache"
SCHEDULER = "config.engine.scheduler"


@pytest.mark.parametrize(
    ("words", "path", "expected"),
    [
        (["--served-model-name", "a", "b"], f"{MODEL}.served_model_names", ("a", "b")),
        (["--served-model-name", "a", "--served-model-name", "b"], f"{MODEL}.served_model_names", ("a", "b")),
        (["--dtype", "half"], f"{MODEL}.dtype", "float16"),
        (["--dtype=bfloat16"], f"{MODEL}.dtype", "bfloat16"),
        (["--max-model-len", "8K"], f"{MODEL}.max_model_len", 8192),
        (["--max_model_len=8k"], f"{MODEL}.max_model_len", 8000),
        (["--max-model-len", "auto"], f"{MODEL}.max_model_len", None),
        (["--max-model-len", "-1"], f"{MODEL}.max_model_len", None),
        (["--seed", "7"], f"{MODEL}.seed", 7),
        (["--generation-config", "vllm"], f"{MODEL}.generation_config", "vllm"),
        (["--chat-template", "{{ messages }}"], f"{MODEL}.chat_template", "{{ messages }}"),
        (["--block-size", "32"], f"{CACHE}.block_size", 32),
        (["--gpu-memory-utilization", "0.5"], f"{CACHE}.gpu_memory_utilization", 0.5),
        (["--kv-cache-memory-bytes", "2G"], f"{CACHE}.kv_cache_memory_bytes", 2**31),
        (["--num-gpu-blocks-override", "9"], f"{CACHE}.num_gpu_blocks_override", 9),
        (["--no-enable-prefix-caching"], f"{CACHE}.enable_prefix_caching", False),
        (["--enable_prefix_caching"], f"{CACHE}.enable_prefix_caching", True),
        (["--max-num-batched-tokens", "4k"], f"{SCHEDULER}.max_num_batched_tokens", 4000),
        (["--max-num-seqs", "8"], f"{SCHEDULER}.max_num_seqs", 8),
        (["--max-num-seqs", "4096"], f"{SCHEDULER}.max_num_batched_tokens", 4096),
        (["--max-num-batched-tokens", "64"], f"{SCHEDULER}.max_num_seqs", 64),
        (["--no-enable-chunked-prefill"], f"{SCHEDULER}.enable_chunked_prefill", False),
        (["--long-prefill-token-threshold", "256"], f"{SCHEDULER}.long_prefill_token_threshold", 256),
        (["--scheduling-policy", "priority"], f"{SCHEDULER}.policy", "priority"),
        (["--max-num-queued-reqs", "5"], f"{SCHEDULER}.max_num_queued_reqs", 5),
        (["--device", "cpu"], "config.engine.device", "cpu"),
        (["--num-threads", "3"], "config.engine.num_threads", 3),
        (["--log-format", "json"], "config.engine.log_format", "json"),
        (["--log-level", "WARNING"], "config.engine.log_level", "warning"),
        (["--host", "::1", "--port", "81"], "config.host", "::1"),
        (["--port", "81"], "config.port", 81),
        (["--api-key", "a", "--api-key", "b"], "config.api_keys", ("a", "b")),
        (["--allowed-origins", '["https://a", "https://b"]'], "config.allowed_origins", ("https://a", "https://b")),
        (["--allowed-origins", "https://a", "https://b"], "config.allowed_origins", ("https://a", "https://b")),
        (["--shutdown-timeout", "3.5"], "config.shutdown_timeout_s", 3.5),
        (["--engine-heartbeat-timeout", "9"], "config.engine_heartbeat_timeout_s", 9.0),
        (["--max-request-body-bytes", "1M"], "config.max_request_body_bytes", 2**20),
        (["--async-scheduling"], "config.engine.scheduler.async_scheduling", True),
        (["--no-async-scheduling"], "config.engine.scheduler.async_scheduling", False),
        ([], "config.engine.scheduler.async_scheduling", None),
        (["--enable-request-id-headers"], "config.enable_request_id_headers", True),
        (["--enable-force-include-usage"], "config.enable_force_include_usage", True),
        (["--strict-fields"], "config.strict_fields", True),
        ([], "config.strict_fields", False),
        (["--response-role", "bot"], "config.response_role", "bot"),
        (["--disable-log-stats"], "config.log_stats", False),
        (["--enable-log-requests"], "config.log_requests", True),
        (["--disable-uvicorn-access-log"], "access_log", False),
        (["--disable-access-log-for-endpoints", "/a, /b"], "quiet_paths", ("/a", "/b")),
        (["--revision", "v1"], "source.revision", None),
        ([], "quiet_paths", PROBE_PATHS),
        ([], "config.shutdown_timeout_s", 120.0),
    ],
)
def test_flags_reach_their_fields(model: str, words: list[str], path: str, expected: Any) -> None:
    assert value_at(parse(model, *words), path) == expected
    assert value_at(parse("--model", model, *words), path) == expected


def test_every_field_of_the_configuration_has_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = {action.dest for action in parser._actions}
    renamed = {"served_model_names", "policy", "api_keys", "log_requests", "log_stats", "path"}
    arguments = parse_config_classes()
    missing = {name.removesuffix("_s") for name in arguments} - flags - renamed
    assert missing == {"parallel"}
    refused = {name.replace("-", "_") for name, flag in COMPAT_FLAGS.items() if flag.fate is Fate.UNSERVED}
    assert {field.name for field in dataclasses.fields(ParallelConfig)} <= refused, "one device, so far"


def parse_config_classes() -> set[str]:
    from quire_server.shared import config

    classes = (config.ModelConfig, config.CacheConfig, config.SchedulerConfig, config.EngineConfig, config.ServerConfig)
    nested = {"model", "cache", "scheduler", "engine"}
    return {field.name for cls in classes for field in dataclasses.fields(cls)} - nested | {"model"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", 7), ("1k", 1000), ("1K", 1024), ("2M", 2**21), ("1.5k", 1500), ("0.5K", 512), ("3g", 3 * 10**9)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "k", "1x", "1.5", "0.3K", "1 k"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--block-size", "7"], "--block-size"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization"),
        (["--port", "70000"], "--port"),
        (["--num-threads", "0"], "--num-threads"),
        (["--api-key", ""], "--api-key"),
        (["--engine-heartbeat-timeout", "0"], "--engine-heartbeat-timeout"),
        (["--generation-config", "/x"], "--generation-config"),
        (["--chat-template", "/nowhere"], "--chat-template: /nowhere"),
        (["--tokenizer", "/nowhere"], "--tokenizer: /nowhere"),
        (["--config", "/nowhere"], "--config: /nowhere"),
        (["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "--max-num-batched-tokens"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_flag(model: str, words: list[str], flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(model, *words)
    assert str(caught.value).startswith(flag)


def test_an_unknown_flag_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="--max-mode-len"):
        parse(model, "--max-mode-len", "8")


def test_no_model() -> None:
    with pytest.raises(ConfigError, match="No model"):
        parse("--port", "1")


@pytest.mark.parametrize(
    ("environment", "words", "expected"),
    [
        ({"QUIRE_API_KEY": "q", "VLLM_API_KEY": "v"}, [], ("q",)),
        ({"VLLM_API_KEY": "v"}, [], ("v",)),
        ({"VLLM_API_KEY": "v"}, ["--api-key", "flag"], ("flag",)),
        ({"VLLM_API_KEY": "", "VLLM_PORT": "tcp://10.0.0.1:80"}, [], ()),
    ],
)
def test_keys_from_the_environment(
    model: str, environment: dict[str, str], words: list[str], expected: tuple[str, ...]
) -> None:
    assert parse(model, *words, environment=environment).config.api_keys == expected


def test_the_command_line_wins_over_the_file(model: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"model: {model}\nport: 1\nmax_model_len: 4K\nserved-model-name: [a, b]\nenable-prefix-caching: false\n"
        "swap-space: 4\nenable-lora: false\nseed: null\ncompilation-config: {level: 3}\n"
    )
    from_file = parse("--config", str(file))
    assert (from_file.config.port, from_file.config.engine.model.max_model_len) == (1, 4096)
    assert from_file.config.engine.model.served_model_names == ("a", "b")
    assert not from_file.config.engine.cache.enable_prefix_caching
    assert len(from_file.warnings) == 1
    both = parse("--port", "2", f"--config={file}", "--served_model_name", "c", "--enable-prefix-caching")
    assert both.config.port == 2
    assert both.config.engine.model.served_model_names == ("c",)
    assert both.config.engine.cache.enable_prefix_caching


@pytest.mark.parametrize("text", ["- a list", "a: [", "just text"])
def test_a_file_that_is_no_map(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="--config"):
        parse("--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--swap-space", "4"], "--swap-space"),
        (["--swap_space=4"], "--swap-space"),
        (["--num-scheduler-steps", "8"], "--num-scheduler-steps"),
        (["--disable-log-requests"], "--disable-log-requests"),
        (["--use-v2-block-manager"], "--use-v2-block-manager"),
        (["--guided-decoding-backend", "outlines"], "--guided-decoding-backend"),
        (["--max-seq-len-to-capture", "8192"], "--max-seq-len-to-capture"),
    ],
)
def test_flags_that_vllm_dropped_are_taken_with_a_warning(model: str, words: list[str], flag: str) -> None:
    arguments = parse(model, *words, "--port", "5")
    assert arguments.config.port == 5
    assert len(arguments.warnings) == 1
    assert arguments.warnings[0].startswith(flag)


@pytest.mark.parametrize(
    "words",
    [
        ["--enforce-eager"],
        ["--no-enforce-eager"],
        ["--trust-remote-code", "--scheduler-reserve-full-isl"],
        ["--compilation-config.cudagraph_mode", "FULL"],
        ["-O3"],
        ["-tp", "1", "-pp", "1"],
        ["--tensor-parallel-size=1"],
        ["--kv-cache-dtype", "auto"],
        ["--speculative-config", "null"],
        ["--quantization", "None"],
        ["--no-enable-lora"],
        ["--load-format", "safetensors"],
        ["--task", "generate"],
        ["--reasoning-parser", ""],
        ["--max-logprobs", "20"],
    ],
)
def test_flags_that_ask_for_nothing_are_taken_in_silence(model: str, words: list[str]) -> None:
    arguments = parse(model, *words, "--port", "5")
    assert arguments.config.port == 5
    assert arguments.warnings == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-tp", "2"], "--tensor-parallel-size 2 is not supported by this server"),
        (["--pipeline_parallel_size=4"], "--pipeline-parallel-size 4"),
        (["--enable-lora"], "--enable-lora is not supported"),
        (["--quantization", "awq"], "--quantization awq"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8"),
        (["--speculative-config", '{"method": "ngram"}'], "--speculative-config"),
        (["--rope-scaling", '{"factor": 2}'], "--rope-scaling"),
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice"),
        (["--tool-call-parser", "hermes"], "--tool-call-parser hermes"),
        (["--ssl-keyfile", "k.pem"], "--ssl-keyfile k.pem"),
        (["--task", "embed"], "--task embed"),
        (["--tensor-parallel-size"], "--tensor-parallel-size"),
    ],
)
def test_flags_that_are_not_served_are_refused_by_name(model: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(model, *words)
    assert str(caught.value).startswith(message)


def test_no_flag_is_both_served_and_not() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    served = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    assert served & set(COMPAT_FLAGS) == set()
    assert all(flag.neutral for flag in COMPAT_FLAGS.values() if flag.fate is Fate.UNSERVED and not flag.is_switch)


def test_json_values_of_a_file_become_flags(model: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps({"speculative-config": {"method": "ngram"}}))
    with pytest.raises(ConfigError, match=r'--speculative-config \{"method": "ngram"\}'):
        parse(model, "--config", str(tmp_path / "c.yaml"))


def test_a_template_file_is_read(model: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ 1 }}")
    arguments = parse(model, "--chat-template", str(tmp_path / "t.jinja"))
    assert arguments.config.engine.model.chat_template == "{{ 1 }}"


def test_the_model_names_itself(model: str) -> None:
    arguments = parse(model)
    assert arguments.config.engine.model.served_model_names == (model,)
    assert arguments.config.engine.model.path == Path(model)
    assert arguments.source.path == Path(model)


def test_deep_nesting_is_a_fault_of_the_flag(model: str, tmp_path: Path) -> None:
    nested = "[" * 100_000 + "]" * 100_000
    (tmp_path / "c.yaml").write_text(f"seed: {nested}")
    with pytest.raises(ConfigError, match=r"--config.*nested too deeply"):
        parse(model, "--config", str(tmp_path / "c.yaml"))
    with pytest.raises(argparse.ArgumentTypeError, match="nested too deeply"):
        parse_list(nested)
