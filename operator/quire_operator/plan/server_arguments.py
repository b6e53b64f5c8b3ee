"""The server's command line for an LLMDeployment: one mapping, for pods and for `quire up`.

A field at its default is left out, so a server without that flag refuses only what is really asked for.
"""

import json

from quire_operator.spec.llm_deployment import EngineSpec, LLMDeployment, SpeculativeSpec


def server_arguments(deployment: LLMDeployment, *, model: str, host: str, port: int) -> list[str]:
    """Return the arguments of `quire serve`. `model` is where the server finds the files."""
    spec = deployment.spec
    arguments = [model, "--host", host, "--port", str(port), "--served-model-name", *spec.model.served_names]
    arguments += _engine_flags(spec.engine)
    arguments += ["--shutdown-timeout", f"{spec.drain.timeout_s:g}"]
    return [*arguments, *spec.engine.extra_args]


def _engine_flags(engine: EngineSpec) -> list[str]:
    flags = ["--max-num-seqs", str(engine.max_num_seqs)]
    for name, value, default in (
        ("max-model-len", engine.max_model_len, None),
        ("dtype", engine.dtype, "auto"),
        ("quantization", engine.quantization, None),
        ("kv-cache-dtype", engine.kv_cache_dtype, "auto"),
        ("tensor-parallel-size", engine.tensor_parallel_size, 1),
        ("pipeline-parallel-size", engine.pipeline_parallel_size, 1),
    ):
        if value != default:
            flags += [f"--{name}", str(value)]
    if engine.speculative is not None:
        flags += ["--speculative-config", _speculative_config(engine.speculative)]
    return flags


def _speculative_config(speculative: SpeculativeSpec) -> str:
    config: dict[str, str | int] = {
        "method": speculative.method,
        "num_speculative_tokens": speculative.num_speculative_tokens,
    }
    if speculative.model is not None:
        config["model"] = speculative.model
    return json.dumps(config)
