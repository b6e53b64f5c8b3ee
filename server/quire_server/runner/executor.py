"""An engine's workers as one `Runner`.

Owns how a step reaches them and how their results become one, on which sizes they agree, and what there is to know of
all of them (`ExecutorInfo`). Does not know what is in a step.
"""

import logging
from dataclasses import dataclass

import torch

from quire_server.engine.step import SchedulerOutput, StepHandle
from quire_server.models.differences import find_differences
from quire_server.runner.kv_cache_plan import KVCachePlan, agree_on_kv_cache
from quire_server.runner.worker import OnProgress, Stopwatch, Worker, plan_worker, start_worker
from quire_server.shared.config import EngineConfig
from quire_server.shared.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorInfo:
    """What an engine has in its workers."""

    kv_cache: KVCachePlan
    """Its sizes are everybody's; its bytes are the first worker's."""
    device: torch.device
    """The first worker's; all are alike."""
    dtype: torch.dtype
    vocab_size: int
    weights_bytes: int
    """The first worker's."""


class UniprocExecutor:
    """A `Runner` of one worker, in the engine's own process: a step is handed on."""

    def __init__(self, worker: Worker) -> None:
        self._runner = worker.runner
        self.info = ExecutorInfo(
            kv_cache=worker.plan,
            device=worker.device,
            dtype=worker.model.dtype,
            vocab_size=worker.model.spec.vocab_size,
            weights_bytes=worker.model.num_parameter_bytes,
        )

    @property
    def is_asynchronous(self) -> bool:
        return self._runner.is_asynchronous

    def submit(self, scheduler_output: SchedulerOutput) -> StepHandle:
        return self._runner.submit(scheduler_output)


def start_executor(config: EngineConfig, *, on_progress: OnProgress, stopwatch: Stopwatch) -> UniprocExecutor:
    """Start as many workers as the configuration asks for.

    Raises:
        StartupError: one of them cannot start, or there would be several.
    """
    num_workers = config.parallel.world_size
    if num_workers != 1:
        raise ConfigError(
            f"An engine of {num_workers} workers was asked for, and only one is served.",
            stage="Starting",
            hint="Set --tensor-parallel-size and --pipeline-parallel-size to 1.",
        )
    plans = [plan_worker(config, rank) for rank in range(num_workers)]
    for difference in find_differences(plans[0].model, plans[0].checkpoint):
        logger.warning("%s", difference)
    agreed = agree_on_kv_cache([plan.kv_cache for plan in plans])
    (worker,) = (
        start_worker(plan, kv_cache, on_progress=on_progress, stopwatch=stopwatch)
        for plan, kv_cache in zip(plans, agreed, strict=True)
    )
    return UniprocExecutor(worker)
