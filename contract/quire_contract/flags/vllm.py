"""vLLM's flags that the server has no use for, so that a manifest written for vLLM starts, or says why it does not.

Three kinds: flags without effect here (silently fine), flags that vLLM itself has dropped (a warning), and flags that
ask for something this server does not do (refused by name, unless they carry their neutral value).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from quire_contract.flags.errors import FlagError, UnservedFlagError


class Fate(Enum):
    NO_EFFECT = "has no effect here"
    DROPPED = "was dropped by vLLM and has no effect"
    UNSERVED = "is not supported by this server"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompatFlag:
    """A flag that is taken off the command line before it is parsed."""

    fate: Fate
    is_switch: bool = False
    """It takes no value."""
    neutral: tuple[str, ...] = ()
    """Values, in lower case, that ask for nothing."""
    note: str = ""


def _flags(fate: Fate, names: str, *, is_switch: bool = False, note: str = "") -> dict[str, CompatFlag]:
    return {name: CompatFlag(fate=fate, is_switch=is_switch, note=note) for name in names.split()}


def _unserved(**neutral_by_name: str) -> dict[str, CompatFlag]:
    """Flags with a value; the neutral ones are separated by blanks."""
    return {
        name.replace("_", "-"): CompatFlag(fate=Fate.UNSERVED, neutral=(*neutral.split(), "", "none", "null"))
        for name, neutral in neutral_by_name.items()
    }


COMPAT_FLAGS: Final[dict[str, CompatFlag]] = {
    **_flags(
        Fate.NO_EFFECT,
        "enforce-eager trust-remote-code disable-custom-all-reduce scheduler-reserve-full-isl"
        " enable-prompt-tokens-details disable-fastapi-docs use-tqdm-on-load disable-cascade-attn show-hidden-metrics"
        " enable-log-outputs",
        is_switch=True,
    ),
    **_flags(
        Fate.NO_EFFECT,
        "compilation-config cudagraph-capture-sizes max-cudagraph-capture-size optimization-level code-revision"
        " tokenizer-revision max-log-len prefix-caching-hash-algo limit-mm-per-prompt mm-processor-kwargs"
        " mm-processor-cache-gb max-parallel-loading-workers uvicorn-log-level numa-bind distributed-timeout-seconds"
        " max-num-partial-prefills max-long-partial-prefills stream-interval master-addr master-port",
    ),
    **_flags(
        Fate.DROPPED,
        "use-v2-block-manager enable-reasoning disable-log-requests worker-use-ray engine-use-ray calculate-kv-scales"
        " multi-step-stream-outputs disable-frontend-multiprocessing disable-async-output-proc",
        is_switch=True,
    ),
    **_flags(
        Fate.DROPPED,
        "preemption-mode num-scheduler-steps guided-decoding-backend max-seq-len-to-capture num-lookahead-slots"
        " max-context-len-to-capture ngram-prompt-lookup-max ngram-prompt-lookup-min block-allocator"
        " scheduler-delay-factor override-attention-dtype",
    ),
    "swap-space": CompatFlag(fate=Fate.DROPPED, note="Preempted requests are computed again instead."),
    "speculative-model": CompatFlag(fate=Fate.DROPPED, note="Tokens are decoded one at a time."),
    "num-speculative-tokens": CompatFlag(fate=Fate.DROPPED, note="Tokens are decoded one at a time."),
    "task": CompatFlag(fate=Fate.UNSERVED, neutral=("generate", "auto")),
    "rope-scaling": CompatFlag(fate=Fate.UNSERVED, neutral=("none", "null", "{}")),
    "rope-theta": CompatFlag(fate=Fate.UNSERVED, neutral=("none", "null")),
    **_unserved(
        tensor_parallel_size="1", pipeline_parallel_size="1", data_parallel_size="1", data_parallel_size_local="1",
        data_parallel_rank="0", nnodes="1", node_rank="0", api_server_count="1", decode_context_parallel_size="1",
        distributed_executor_backend="mp uni", quantization="auto", load_format="auto safetensors gguf",
        model_loader_extra_config="{}", tokenizer_mode="auto hf", model_impl="auto vllm transformers",
        runner="auto generate", convert="auto none", attention_backend="auto", kv_cache_dtype="auto",
        cpu_offload_gb="0 0.0", kv_offloading_size="0 0.0", kv_offloading_backend="native", hf_overrides="{}",
        override_generation_config="{}", hf_config_path="", speculative_config="{}", lora_modules="", lora_dtype="auto",
        max_loras="1", max_lora_rank="16", max_cpu_loras="", structured_outputs_config="{}", reasoning_parser="",
        tool_call_parser="", tool_parser_plugin="", chat_template_content_format="auto",
        default_chat_template_kwargs="{}", max_logprobs="20", logprobs_mode="raw_logprobs", kv_transfer_config="{}",
        kv_events_config="{}", otlp_traces_endpoint="", ssl_keyfile="", ssl_certfile="", ssl_ca_certs="",
        ssl_cert_reqs="0", root_path="", middleware="", uds="", grpc_port="", allowed_methods='* ["*"]',
        allowed_headers='* ["*"]', allowed_local_media_path="", allowed_media_domains="", logits_processors="",
        pooler_config="{}", additional_config="{}", profiler_config="{}", max_num_queued_tokens="",
        disable_hybrid_kv_cache_manager="", served_model_revision="",
    ),
    **_flags(
        Fate.UNSERVED,
        "enable-lora fully-sharded-loras enable-auto-tool-choice enable-expert-parallel enable-sleep-mode headless grpc"
        " trust-request-chat-template enable-server-load-tracking return-tokens-as-token-ids enable-ssl-refresh"
        " enable-tokenizer-info-endpoint allow-credentials enable-prompt-embeds enable-mfu-metrics kv-cache-metrics"
        " skip-tokenizer-init",
        is_switch=True,
    ),
}  # fmt: skip

SHORT_NAMES: Final = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-asc": "api-server-count",
    "-q": "quantization",
    "-cc": "compilation-config",
    "-sc": "speculative-config",
    "-O": "optimization-level",
}


def with_dashes(token: str) -> str:
    """Return an argument with the dashes that its flag's name may have as underscores."""
    if not token.startswith("--"):
        return token
    name, separator, value = token.partition("=")
    return name.replace("_", "-") + separator + value


def canonical_name(token: str) -> str:
    """Return a flag's name with dashes and without its value; dotted fields of a nested flag are left out."""
    return token.partition("=")[0].removeprefix("--").partition(".")[0].replace("_", "-")


def take_compat_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without vLLM's other flags, and a warning for each dropped one that was there.

    Raises:
        FlagError: a flag asks for something that this server does not do, or lacks its value.
    """
    kept: list[str] = []
    warnings: list[str] = []
    remaining = deque(argv)
    while remaining:
        token = remaining.popleft()
        name = _compat_name(token)
        if name is None:
            kept.append(token)
            continue
        is_negated = name not in COMPAT_FLAGS
        flag = COMPAT_FLAGS[name.removeprefix("no-") if is_negated else name]
        value = None if flag.is_switch or is_negated else _value_of(name, token, remaining)
        if flag.fate is Fate.DROPPED:
            warnings.append(f"--{name} {flag.fate.value}. {flag.note}".rstrip())
        elif flag.fate is Fate.UNSERVED and not is_negated and not _is_neutral(flag, value):
            raise UnservedFlagError(_refusal(name, flag, value))
    return kept, warnings


def _compat_name(token: str) -> str | None:
    """Return which compatibility flag a token is, `no-` prefix included; None if it is something else."""
    short = token.partition("=")[0]
    if short in SHORT_NAMES:
        return SHORT_NAMES[short]
    if token.startswith("-O") and token[2:].isdigit():
        return "enforce-eager"  # -O0 … -O3 in one word: a switch without effect
    if not token.startswith("--"):
        return None
    name = canonical_name(token)
    if name in COMPAT_FLAGS:
        return name
    positive = COMPAT_FLAGS.get(name.removeprefix("no-"))
    return name if name.startswith("no-") and positive is not None and positive.is_switch else None


def _value_of(name: str, token: str, following: deque[str]) -> str:
    _, separator, value = token.partition("=")
    if separator:
        return value
    if not following or following[0].startswith("--"):
        raise FlagError(f"--{name} needs a value")
    return following.popleft()


def _is_neutral(flag: CompatFlag, value: str | None) -> bool:
    return value is not None and value.strip().lower() in flag.neutral


def _refusal(name: str, flag: CompatFlag, value: str | None) -> str:
    shown = f"--{name}" if value is None else f"--{name} {value}"
    neutral = ", ".join(repr(text) for text in flag.neutral if text not in ("", "none", "null"))
    cure = f"leave it out, or give {neutral}" if neutral else "leave it out"
    return f"{shown} {flag.fate.value}; {cure}"
