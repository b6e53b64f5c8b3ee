"""The server's command line for an LLMDeployment: one mapping, for pods and for `quire up`; and what extraArgs say.

A field at its default is left out, so a server without that flag refuses only what is really asked for. A value is
written `--flag=value`, so that none of a spec can be taken for a flag.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from quire_contract.flags.errors import FlagError
from quire_contract.flags.reading import read_flags
from quire_contract.flags.vllm import canonical_name
from quire_operator.spec.llm_deployment import EngineSpec, LLMDeployment, SpecError, SpeculativeSpec

EXTRA_ARGS: Final = "spec.engine.extraArgs"
_RESERVED: Final = frozenset(
    {"host", "port", "fd", "model", "config", "served-model-name", "shutdown-timeout", "hf-token", "download-dir"}
)


def server_arguments(deployment: LLMDeployment, *, model: str, host: str, port: int) -> list[str]:
    """Return the arguments of `quire serve`, without `engine.extraArgs`, which follow and win.

    `model` is where the server finds the files.
    """
    spec = deployment.spec
    return [
        model,
        f"--host={host}",
        f"--port={port}",
        *(f"--served-model-name={name}" for name in spec.model.served_names),
        *_engine_flags(spec.engine),
        f"--shutdown-timeout={spec.drain.timeout_s:g}",
    ]


def read_extra_args(deployment: LLMDeployment) -> Mapping[str, Any]:
    """Return what `engine.extraArgs` set, as the server will read them.

    Raises:
        SpecError: the server would refuse to start with them (its cause is the FlagError), or one is the operator's.
    """
    given = deployment.spec.engine.extra_args
    for index, token in enumerate(given):
        if token.startswith("--") and canonical_name(token) in _RESERVED:
            raise SpecError(f"{EXTRA_ARGS}[{index}]", f"--{canonical_name(token)} is set by the operator; remove it")
    try:
        return read_flags(given)
    except FlagError as error:
        raise SpecError(EXTRA_ARGS, str(error)) from error


def _engine_flags(engine: EngineSpec) -> list[str]:
    flags = [f"--max-num-seqs={engine.max_num_seqs}"]
    for name, value, default in (
        ("max-model-len", engine.max_model_len, None),
        ("dtype", engine.dtype, "auto"),
        ("quantization", engine.quantization, None),
        ("kv-cache-dtype", engine.kv_cache_dtype, "auto"),
        ("tensor-parallel-size", engine.tensor_parallel_size, 1),
        ("pipeline-parallel-size", engine.pipeline_parallel_size, 1),
    ):
        if value != default:
            flags.append(f"--{name}={value}")
    if engine.speculative is not None:
        flags.append(f"--speculative-config={_speculative_config(engine.speculative)}")
    return flags


def _speculative_config(speculative: SpeculativeSpec) -> str:
    config: dict[str, str | int] = {
        "method": speculative.method,
        "num_speculative_tokens": speculative.num_speculative_tokens,
    }
    if speculative.model is not None:
        config["model"] = speculative.model
    return json.dumps(config)
