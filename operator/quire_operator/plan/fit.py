"""Does the model fit what one replica gets? The contract's arithmetic, asked with the settings of the server to come.

`read_engine_settings` follows the server: its defaults, and `engine.extraArgs` over the fields, because the last flag
wins. What the server itself holds besides (interpreter, libraries, buffers) is not counted: a `no` from here is
certain, a `yes` is not. Knows no cluster.
"""

from dataclasses import dataclass, replace
from typing import Final

from quire_contract.memory.fit import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_GPU_MEMORY_UTILIZATION,
    DEFAULT_MAX_NUM_BATCHED_TOKENS,
    FitError,
    FitReport,
    FitRequest,
    check_fit,
)
from quire_contract.model_facts import ModelFacts
from quire_contract.units import format_bytes, parse_quantity
from quire_operator.plan.actions import Verdict
from quire_operator.plan.hardware import Hardware
from quire_operator.plan.server_arguments import EXTRA_ARGS, read_extra_args
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_operator.spec.settings import NVIDIA_GPU

_TARGET_SHARE: Final = 0.8
_LEN_STEP: Final = 256
"""A context length that is recommended is rounded down to a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What decides over the server's memory, as the server will read its command line."""

    dtype: str
    kv_cache_dtype: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    gpu_memory_utilization: float
    tensor_parallel_size: int
    pipeline_parallel_size: int
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The verdict, and the numbers behind it where there are any."""

    verdict: Verdict
    report: FitReport | None = None


def read_engine_settings(deployment: LLMDeployment) -> EngineSettings:
    """Return the settings that the server will have.

    Raises:
        SpecError: a flag in extraArgs has no usable value, or asks for what cannot be.
    """
    engine = deployment.spec.engine
    flags = read_extra_args(deployment)
    max_num_seqs = flags.get("max_num_seqs", engine.max_num_seqs)
    num_tokens = flags.get("max_num_batched_tokens", max(DEFAULT_MAX_NUM_BATCHED_TOKENS, max_num_seqs))
    if num_tokens < max_num_seqs:
        rule = f"must be at least the {max_num_seqs} of engine.maxNumSeqs, not {num_tokens}"
        raise SpecError(EXTRA_ARGS, f"--max-num-batched-tokens: {rule}")
    return EngineSettings(
        dtype=flags.get("dtype", engine.dtype),
        kv_cache_dtype=engine.kv_cache_dtype,
        max_model_len=flags.get("max_model_len", engine.max_model_len),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=num_tokens,
        block_size=flags.get("block_size", DEFAULT_BLOCK_SIZE),
        gpu_memory_utilization=flags.get("gpu_memory_utilization", DEFAULT_GPU_MEMORY_UTILIZATION),
        tensor_parallel_size=engine.tensor_parallel_size,
        pipeline_parallel_size=engine.pipeline_parallel_size,
        kv_cache_memory_bytes=flags.get("kv_cache_memory_bytes"),
        num_gpu_blocks_override=flags.get("num_gpu_blocks_override"),
    )


def judge_fit(settings: EngineSettings, hardware: Hardware, facts: ModelFacts | None) -> Fit:
    """Tell whether one replica can start; None where the model or the memory is not known."""
    if facts is None:
        return _unknown("ModelUnknown", "The model's files are not there yet.")
    if facts.shape is None:
        if facts.is_outdated:
            return _unknown("FactsOutdated", f"Whether the model fits is being found out: {facts.shape_error}.")
        return _unknown("ArchitectureUnknown", f"Whether the model fits cannot be told: {facts.shape_error}.")
    memory_bytes = device_memory_bytes(settings, hardware)
    if memory_bytes is None:
        return _unknown("MemoryUnknown", _cure_for_unknown_memory(hardware))
    try:
        request = FitRequest(
            shape=facts.shape,
            memory_bytes=memory_bytes,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            dtype=settings.dtype,
            kv_cache_dtype=settings.kv_cache_dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            block_size=settings.block_size,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
        )
        return _judge(settings, hardware, _with_fixed_cache(request, settings))
    except FitError as error:
        return _refused_by_model(settings, facts, str(error))


def device_memory_bytes(settings: EngineSettings, hardware: Hardware) -> int | None:
    """Return the memory of one device: a GPU's, or a share of the pod's limit; None where it is not known."""
    if hardware.num_gpus:
        return hardware.gpu_memory_bytes
    limit = hardware.limits.get("memory")
    return None if limit is None else int(parse_quantity(limit)) // settings.tensor_parallel_size


def target_pending_per_replica(deployment: LLMDeployment, settings: EngineSettings, report: FitReport | None) -> int:
    """Return the requests that one replica is meant to have: as given, or four fifths of what it can run at once."""
    given = deployment.spec.scaling.target_pending_per_replica
    if given is not None:
        return given
    target = int(settings.max_num_seqs * _TARGET_SHARE)
    if report is not None and report.fits:
        target = min(target, report.max_concurrent_sequences)
    return max(target, 1)


def _judge(settings: EngineSettings, hardware: Hardware, request: FitRequest) -> Fit:
    report = check_fit(request)
    if not report.fits and request.max_model_len is None and report.max_model_len > 0:
        # The server lowers a length that nobody demanded to what its cache holds.
        report = check_fit(replace(request, max_model_len=report.max_model_len))
    if report.fits and request.memory_bytes > (device_memory_bytes(settings, hardware) or 0):
        have = device_memory_bytes(settings, hardware) or 0
        report = replace(report, fits=False, need_bytes=request.memory_bytes, have_bytes=have, max_model_len=0)
    if report.fits:
        length = request.max_model_len or report.max_model_len
        message = f"{report.max_concurrent_sequences} sequences of {length} tokens run at once."
        return Fit(verdict=Verdict(holds=True, reason="Fits", message=message), report=report)
    needs = f"needs {format_bytes(report.need_bytes)}, has {format_bytes(report.have_bytes)}"
    verdict = Verdict(holds=False, reason="OutOfMemory", message=f"{needs}; {_cure(settings, hardware, report)}")
    return Fit(verdict=verdict, report=report)


def _cure(settings: EngineSettings, hardware: Hardware, report: FitReport) -> str:
    has_fixed_cache = settings.kv_cache_memory_bytes is not None or settings.num_gpu_blocks_override is not None
    if report.max_model_len > 0 and not has_fixed_cache:
        return f"engine.maxModelLen {_round_down(report.max_model_len)} would fit"
    if has_fixed_cache:
        flags = "--kv-cache-memory-bytes and --num-gpu-blocks-override"
        length = f", or set engine.maxModelLen to {report.max_model_len}" if report.max_model_len else ""
        return f"remove {flags} from engine.extraArgs{length}"
    if hardware.num_gpus:
        return "no context length would fit; use a GPU with more memory"
    return f"no context length would fit; raise {hardware.memory_field}"


def _round_down(length: int) -> int:
    return length // _LEN_STEP * _LEN_STEP or length


def _with_fixed_cache(request: FitRequest, settings: EngineSettings) -> FitRequest:
    """Give the request as much memory as its fixed KV cache takes: then the server asks no further."""
    if settings.kv_cache_memory_bytes is None and settings.num_gpu_blocks_override is None:
        return request
    report = check_fit(request)
    kv_bytes = settings.kv_cache_memory_bytes or 0
    if settings.num_gpu_blocks_override is not None:
        kv_bytes = settings.num_gpu_blocks_override * settings.block_size * report.kv_bytes_per_token
    total = report.weights_bytes + report.workspace_bytes + kv_bytes
    return replace(request, memory_bytes=total, gpu_memory_utilization=1.0)


def _refused_by_model(settings: EngineSettings, facts: ModelFacts, message: str) -> Fit:
    assert facts.shape is not None
    positions = facts.shape.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > positions:
        cure = f"engine.maxModelLen {settings.max_model_len} is more than the model's {positions} positions; lower it"
        return Fit(verdict=Verdict(holds=False, reason="MaxModelLenTooLong", message=cure))
    return _unknown("FitUnknown", f"Whether the model fits cannot be told: {message}.")


def _unknown(reason: str, message: str) -> Fit:
    return Fit(verdict=Verdict(holds=None, reason=reason, message=message))


def _cure_for_unknown_memory(hardware: Hardware) -> str:
    if hardware.num_gpus:
        resource = hardware.gpu_resource
        cure = f"an administrator sets `memory` of the profile, or accelerators[{resource}].memory"
        whole = ", or `gpuMemory`" if resource == NVIDIA_GPU else ""
        return f"The memory of one {resource} is not known; {cure}{whole}."
    return f"The memory of a pod is not bounded; set {hardware.memory_field}."
