"""An engine's workers as one `Runner`.

Owns how a step reaches them and how their results become one. Does not know what is in a step.
"""

from quire_server.config import EngineConfig
from quire_server.engine.step import SchedulerOutput, StepHandle
from quire_server.errors import ConfigError
from quire_server.runner.worker import OnProgress, Stopwatch, Worker, start_worker


class UniprocExecutor:
    """A `Runner` of one worker, in the engine's own process: a step is handed on."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        """The one of rank 0, which speaks for all."""

    def submit(self, scheduler_output: SchedulerOutput) -> StepHandle:
        return self.worker.submit(scheduler_output)


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
    return UniprocExecutor(start_worker(config, 0, on_progress=on_progress, stopwatch=stopwatch))
