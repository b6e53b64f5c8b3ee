"""From a configuration to an engine that can step: workers, core, warm-up. For the engine process and for `LLM`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quire_contract.memory.fit import NUM_NULL_BLOCKS
from quire_contract.phases import Phase
from quire_kernels import backend_summary
from quire_server.engine.border.messages import EngineProgress, EngineReady
from quire_server.engine.core import EngineCore, EngineCoreConfig
from quire_server.engine.step import NewRequestData, Runner, ScheduledRequest, SchedulerOutput
from quire_server.runner.executor import ExecutorInfo, start_executor
from quire_server.runner.kv_cache_plan import KVCachePlan
from quire_server.runner.worker import OnProgress, Stopwatch
from quire_server.shared.config import EngineConfig, SchedulerConfig
from quire_server.shared.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_NUM_WARM_UP_TOKENS = 8
_SLOW_STEP_S = 600.0
"""A long prompt's step in a large model, on the slowest CPUs that one may try it on."""
_COMPILING_STEP_S = 180.0
"""An accelerator's step in whose middle a kernel is compiled, or a graph recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedEngine:
    """An engine that is ready to step, and what there is to know of it."""

    core: EngineCore
    info: EngineReady


def start_engine(
    config: EngineConfig, *, on_progress: OnProgress, earlier_seconds: Mapping[str, float] | None = None
) -> StartedEngine:
    """Bring an engine up.

    Args:
        on_progress: hears of loading (with percent) and of the warm-up.
        earlier_seconds: stages of the start that were over before, such as the imports.

    Raises:
        StartupError: the configuration, the checkpoint or the memory does not allow it.
    """
    stopwatch = Stopwatch(earlier_seconds or {})
    executor = start_executor(config, on_progress=on_progress, stopwatch=stopwatch)
    core = EngineCore(_build_core_config(config, executor.info.kv_cache, executor), executor)
    on_progress(EngineProgress(phase=Phase.WARMING_UP))
    warm_up(executor, executor.info.kv_cache)
    stopwatch.lap("warm_up")
    info = _build_info(executor.info, stopwatch.seconds)
    logger.info("Engine is ready: device=%s dtype=%s seconds=%s", info.device, info.dtype, info.load_seconds)
    return StartedEngine(core=core, info=info)


def warm_up(runner: Runner, plan: KVCachePlan) -> None:
    """Run one small prefill and one decode, so that the first request does not pay for what is built on first use.

    Writes to block 1, which nobody holds yet and nobody reads before it is written again.
    """
    num_tokens = min(_NUM_WARM_UP_TOKENS, plan.max_model_len - 1)
    if num_tokens == 0:
        return
    request = NewRequestData(
        request_id="warm-up",
        token_ids=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling_params=SamplingParams(seed=0),
        eos_token_ids=(),
    )
    block_ids = [1] * (num_tokens // plan.block_size + 1)
    prefill = _warm_up_share(first_position=0, num_tokens=num_tokens, new_block_ids=block_ids)
    decode = _warm_up_share(first_position=num_tokens, num_tokens=1)
    for step in (
        SchedulerOutput(scheduled=[prefill], new_requests=[request]),
        SchedulerOutput(scheduled=[decode]),
        SchedulerOutput(removed_request_ids=["warm-up"]),
    ):
        runner.submit(step).result()


def _warm_up_share(*, first_position: int, num_tokens: int, new_block_ids: Sequence[int] = ()) -> ScheduledRequest:
    return ScheduledRequest(
        request_id="warm-up",
        epoch=0,
        first_position=first_position,
        num_tokens=num_tokens,
        num_samples=1,
        new_block_ids=new_block_ids,
    )


def _build_core_config(config: EngineConfig, plan: KVCachePlan, runner: Runner) -> EngineCoreConfig:
    return EngineCoreConfig(
        scheduler=config.scheduler,
        max_model_len=plan.max_model_len,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        kv_cache=plan.whole,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        max_steps_ahead=num_steps_ahead(config.scheduler, runner),
    )


def num_steps_ahead(config: SchedulerConfig, runner: Runner) -> int:
    """Return how many steps may be in flight when another one is scheduled.

    Where the host computes the step itself, looking ahead gains nothing (docs/adr/0005).
    """
    if config.async_scheduling and not runner.is_asynchronous:
        logger.warning(
            "--async-scheduling: this device has done a step when it is handed over, so that results come a step late"
            " and nothing is gained."
        )
    is_wanted = runner.is_asynchronous if config.async_scheduling is None else config.async_scheduling
    return 1 if is_wanted else 0


def max_step_s(device: torch.device) -> float:
    """Return how long a step may take before the engine is taken for hung."""
    return _SLOW_STEP_S if device.type == "cpu" else _COMPILING_STEP_S


def _build_info(info: ExecutorInfo, seconds: dict[str, float]) -> EngineReady:
    plan = info.kv_cache
    return EngineReady(
        max_model_len=plan.max_model_len,
        vocab_size=info.vocab_size,
        num_blocks=plan.num_blocks - NUM_NULL_BLOCKS,
        block_size=plan.block_size,
        dtype=str(info.dtype).removeprefix("torch."),
        device=backend_summary(info.device),
        weights_bytes=info.weights_bytes,
        kv_cache_bytes=plan.budget.kv_cache,
        load_seconds=seconds,
        max_step_s=max_step_s(info.device),
    )
