"""The engine's step: schedule → submit → update.

Owns the scheduler, the steps in flight, and the outputs that no step makes (a refusal, an abort). Does not know
processes, sockets or time. With `max_steps_ahead` n, a step is scheduled before the results of the n steps before it
are there, so that a device has its next work while the host looks at the last.

What `step` returns is all that clients hear: every request that was added gets exactly one output with a finish reason,
unless the runner raises. That is fatal: whoever runs the steps ends the engine, and with it every request.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from quire_contract.memory.kv_cache import KVCacheSpec
from quire_server.engine.kv_cache_manager import KVCacheManager, KVCacheParams
from quire_server.engine.output import EngineCoreOutput, SchedulerStats
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.engine.scheduler import Scheduler
from quire_server.engine.step import Runner, SchedulerOutput, StepHandle
from quire_server.shared.config import SchedulerConfig
from quire_server.shared.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCoreConfig:
    """All that the engine core needs to know; numbers that are known once the model is loaded."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    max_model_len: int
    num_blocks: int
    """Blocks of the KV tensors, the reserved block 0 among them."""
    block_size: int
    kv_cache: KVCacheSpec
    """Of the whole model."""
    enable_prefix_caching: bool = True
    max_steps_ahead: int = 0
    """Steps that may be in flight when another one is scheduled."""


class EngineCore:
    """Runs requests, step by step."""

    def __init__(self, config: EngineCoreConfig, runner: Runner) -> None:
        kv_cache = KVCacheManager(
            KVCacheParams(
                num_blocks=config.num_blocks,
                block_size=config.block_size,
                max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
                kv_cache=config.kv_cache,
                enable_prefix_caching=config.enable_prefix_caching,
            )
        )
        self._scheduler = Scheduler(config.scheduler, kv_cache, config.max_model_len)
        self._runner = runner
        self._max_steps_ahead = config.max_steps_ahead
        self._in_flight: deque[tuple[SchedulerOutput, StepHandle]] = deque()
        self._is_stalled = False
        self._pending_outputs: list[EngineCoreOutput] = []

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do: requests to run, outputs to return, or removals to tell the runner."""
        return self._scheduler.has_unfinished or bool(self._pending_outputs or self._in_flight)

    @property
    def is_stalled(self) -> bool:
        """Whether the last `step` found nothing that can be done until something outside has happened (`unblock`)."""
        return self._is_stalled

    def add_request(self, request: EngineRequest, blockers: Collection[str] = ()) -> None:
        """Take a request; one that can never run ends at the next step, with an error that says why.

        Args:
            blockers: what has to be there before it can run, each to be told to `unblock`; nobody behind it waits.
        """
        self._is_stalled = False
        try:
            self._scheduler.add_request(request, blockers)
        except InvalidRequestError as error:
            self._pending_outputs.append(EngineCoreOutput.failed(request.request_id, error))

    def unblock(self, request_id: str, blocker: str) -> None:
        """Say that a request need not wait for `blocker` any more."""
        self._is_stalled = False
        self._scheduler.unblock(request_id, blocker)

    def abort_requests(self, request_ids: list[str]) -> None:
        """End requests, at any moment. Those that were live get an output at the next step; others are ignored."""
        self._is_stalled = False
        for request_id in self._scheduler.abort_requests(request_ids):
            self._pending_outputs.append(EngineCoreOutput(request_id=request_id, finish_reason=FinishReason.ABORT))

    def step(self, now: float) -> list[EngineCoreOutput]:
        """Schedule a step, hand it to the runner, and return what came of the oldest one if enough are in flight.

        `now` is the Unix time in seconds. The runner is called only when there is something for it to do. Whatever it
        raises is passed on.
        """
        scheduler_output = self._scheduler.schedule(now)
        if not scheduler_output.is_empty:
            self._in_flight.append((scheduler_output, self._runner.submit(scheduler_output)))
        self._is_stalled = not (self._in_flight or self._pending_outputs)
        outputs: list[EngineCoreOutput] = []
        if len(self._in_flight) > (0 if scheduler_output.is_empty else self._max_steps_ahead):
            oldest, handle = self._in_flight.popleft()
            outputs = self._scheduler.update_from_output(oldest, handle.result())
        pending_outputs, self._pending_outputs = self._pending_outputs, []
        return pending_outputs + outputs

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def reset_prefix_cache(self) -> None:
        """Let no request find what was computed before now. Running requests go on."""
        self._scheduler.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Assert the engine's invariants. Costs as much as there are blocks: for tests and for idle moments."""
        self._scheduler.check_integrity()
