"""Which requests get how many tokens in the next step, and what a step's tokens mean for them.

Owns every live request, the waiting queue and the running list. Asks the KV cache manager for room and does not know
how blocks are kept; does not know the runner, nor what time it is (`now` is an argument).

There are no phases. `num_computed_tokens` of each request chases its `num_tokens`; a step hands out one token budget,
to running requests first and then to waiting ones. A prompt, a chunk of one, a decode and a recomputation are the same.

Invariants:
* A live request is in exactly one place: the waiting queue (waiting, preempted) or the running list (running).
* Tokens scheduled in a step ≤ max_num_batched_tokens; running requests ≤ max_num_seqs.
* `num_computed_tokens` is advanced when a step is scheduled, and only ever falls back, to 0, by preemption.
* What was let in fits alone, so the first of the running (FCFS) or the best of them (priority) always gets its blocks:
  as long as there are live requests, every step schedules at least one token.
"""

from collections.abc import Iterable, Sequence

from quire_server.config import SchedulerConfig
from quire_server.engine.finish import Finish, find_finish
from quire_server.engine.kv_cache_manager import NO_PREFIX, CachedPrefix, KVCacheManager
from quire_server.engine.output import RequestOutput, RunnerOutput, SchedulerOutput, SchedulerStats, TokenLogprobs
from quire_server.engine.request import EngineRequest, FinishReason, Request, RequestStatus
from quire_server.engine.request_queue import build_request_queue
from quire_server.engine.step_builder import StepBuilder
from quire_server.errors import ContextLengthError, InvalidRequestError

_WATERMARK = 0.01
"""Share of blocks that an admission leaves free for running requests to grow into."""


class Scheduler:
    """Decides each step's work. See the module for the invariants."""

    def __init__(self, config: SchedulerConfig, kv_cache: KVCacheManager, max_model_len: int) -> None:
        self._config = config
        self._kv_cache = kv_cache
        self._max_model_len = max_model_len
        self._requests: dict[str, Request] = {}
        self._waiting = build_request_queue(config.policy)
        self._running: list[Request] = []
        self._removed_request_ids: list[str] = []
        self._max_chunk = _max_chunk(config)
        self._num_watermark_blocks = int(_WATERMARK * kv_cache.num_total_blocks)
        self._prefix_cache_queries = 0
        self._prefix_cache_hits = 0
        self._num_preemptions = 0
        self._num_steps = 0
        self._step_num_tokens = 0

    # Requests in and out

    @property
    def request_ids(self) -> list[str]:
        """Every live request, oldest first."""
        return list(self._requests)

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything to compute, or the runner still has to hear that a request is gone."""
        return bool(self._requests or self._removed_request_ids)

    def add_request(self, engine_request: EngineRequest) -> None:
        """Let a request wait for its turn.

        Raises:
            ContextLengthError: prompt and answer are longer than the model's context.
            InvalidRequestError: the request could never run, or its id is in use.
        """
        request = Request.from_engine_request(engine_request)
        self._refuse_if_impossible(request)
        self._requests[request.request_id] = request
        self._waiting.add(request)

    def abort_requests(self, request_ids: Iterable[str]) -> list[str]:
        """End requests at once, wherever they are. Returns the ids of those that were live; others are ignored.

        Tokens that a step in flight still samples for them are dropped.
        """
        aborted = [
            self._requests[request_id] for request_id in dict.fromkeys(request_ids) if request_id in self._requests
        ]
        for request in aborted:
            if request.status is not RequestStatus.RUNNING:
                self._waiting.remove(request)
            self._finish(request, Finish(FinishReason.ABORT))
        self._forget_finished()
        return [request.request_id for request in aborted]

    # A step: schedule, then (once the runner has run) update

    def schedule(self, now: float) -> SchedulerOutput:
        """Choose the next step's work. The caller runs it, then calls `update_from_output`."""
        step = StepBuilder(self._config.max_num_batched_tokens)
        self._schedule_running(step)
        for request, num_tokens in step.commit_running():
            self._advance(request, num_tokens)
        if not step.has_preempted:
            self._schedule_waiting(step, now)
        removed_request_ids, self._removed_request_ids = self._removed_request_ids, []
        scheduler_output = step.build(removed_request_ids, self._kv_cache.take_block_copies())
        self._step_num_tokens = scheduler_output.total_num_scheduled_tokens
        self._num_steps += self._step_num_tokens > 0
        return scheduler_output

    def update_from_output(self, scheduler_output: SchedulerOutput, runner_output: RunnerOutput) -> list[RequestOutput]:
        """Give each request the tokens that the step made for it, and end those that are done."""
        outputs = []
        has_finished = False
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                continue  # Aborted while the step ran; perhaps its id has been used again since.
            output = self._update_request(request, num_tokens, runner_output)
            if output is not None:
                outputs.append(output)
                has_finished = has_finished or output.finish_reason is not None
        if has_finished:
            self._forget_finished()
        self._kv_cache.finish_block_copies(scheduler_output.block_copies)
        return outputs

    # The rest of the surface

    def reset_prefix_cache(self) -> None:
        self._kv_cache.reset_prefix_cache()

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_cache_usage=self._kv_cache.usage,
            prefix_cache_queries=self._prefix_cache_queries,
            prefix_cache_hits=self._prefix_cache_hits,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            step_num_tokens=self._step_num_tokens,
        )

    def check_integrity(self) -> None:
        """Assert the invariants. O(requests and blocks): for tests and for when the engine idles."""
        self._kv_cache.check_integrity()
        waiting = {request.request_id for request in self._waiting}
        running = {request.request_id for request in self._running}
        assert len(running) == len(self._running) <= self._config.max_num_seqs
        assert not waiting & running
        assert waiting | running == self._requests.keys()
        assert all(request.status is RequestStatus.RUNNING for request in self._running)
        assert all(request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) for request in self._waiting)
        assert all(request.num_computed_tokens == 0 for request in self._waiting)
        assert all(0 < request.num_computed_tokens <= request.num_tokens for request in self._running)
        if not self._requests:
            assert self._kv_cache.usage == 0.0

    # Admission

    def _refuse_if_impossible(self, request: Request) -> None:
        num_prompt_tokens, max_tokens = request.num_prompt_tokens, request.max_tokens
        if request.request_id in self._requests:
            raise InvalidRequestError(f"The request id {request.request_id!r} is already in use.", "request_id")
        if num_prompt_tokens + max_tokens > self._max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {self._max_model_len} tokens. However, you requested "
                f"{num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} in the prompt, {max_tokens} in the "
                "completion). Please reduce the length of the prompt or of the completion.",
                "max_tokens" if num_prompt_tokens < self._max_model_len else "prompt",
            )
        # The last token sampled is never computed, so it needs no room.
        if not self._kv_cache.fits_alone(num_prompt_tokens + max(max_tokens - 1, 0)):
            raise InvalidRequestError(
                f"The KV cache holds {self._kv_cache.capacity_tokens} tokens, which is less than the "
                f"{num_prompt_tokens + max_tokens} tokens requested ({num_prompt_tokens} in the prompt, {max_tokens} "
                "in the completion). Please reduce the length of the prompt or of the completion.",
                "max_tokens",
            )

    def _schedule_waiting(self, step: StepBuilder, now: float) -> None:
        """Admit waiting requests in their order, until one does not fit."""
        if not self._waiting or not self._has_seat(step):
            return
        num_reserved_blocks = sum(
            self._kv_cache.num_missing_blocks(request)
            for request in self._running
            if request.num_computed_tokens < request.num_tokens
        )
        while self._waiting and self._has_seat(step):
            request = self._waiting.peek()
            prefix = self._find_cached_prefix(request)
            num_tokens = self._num_tokens_to_admit(request, prefix, step.token_budget)
            if num_tokens == 0 or not self._can_admit(request, prefix, num_reserved_blocks):
                break
            self._admit(step, request, prefix, num_tokens, now)
            num_reserved_blocks += self._kv_cache.num_missing_blocks(request)

    def _has_seat(self, step: StepBuilder) -> bool:
        return step.token_budget > 0 and len(self._running) < self._config.max_num_seqs

    def _find_cached_prefix(self, request: Request) -> CachedPrefix:
        if request.sampling_params.prompt_logprobs is not None:
            return NO_PREFIX  # A position that is not computed has no logits.
        return self._kv_cache.find_cached_prefix(request)

    def _can_admit(self, request: Request, prefix: CachedPrefix, num_reserved_blocks: int) -> bool:
        """Say whether the whole sequence fits beside what the running ones still need for theirs.

        A prompt that is admitted chunk by chunk would otherwise be preempted, or preempt, halfway.
        """
        num_watermark_blocks = self._num_watermark_blocks if self._running else 0
        return self._kv_cache.can_admit(request, prefix, num_reserved_blocks + num_watermark_blocks)

    def _admit(self, step: StepBuilder, request: Request, prefix: CachedPrefix, num_tokens: int, now: float) -> None:
        block_ids = self._kv_cache.allocate(request, num_tokens, prefix)
        assert block_ids is not None, "what can be admitted can be allocated"
        self._waiting.pop()
        self._running.append(request)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = prefix.num_tokens
        if request.scheduled_time is None:
            request.scheduled_time = now
            self._count_prefix_hit(request, prefix)
        step.add_new(request, num_tokens, block_ids)
        self._advance(request, num_tokens)

    def _count_prefix_hit(self, request: Request, prefix: CachedPrefix) -> None:
        request.num_cached_tokens = prefix.num_tokens
        if request.sampling_params.prompt_logprobs is None:
            self._prefix_cache_queries += request.num_tokens
            self._prefix_cache_hits += prefix.num_tokens

    # Running requests

    def _schedule_running(self, step: StepBuilder) -> None:
        for request in tuple(self._running):
            if step.token_budget == 0:
                break
            if request.status is not RequestStatus.RUNNING:
                continue  # Preempted for a request before it.
            num_tokens = self._num_tokens_to_continue(request, step.token_budget)
            new_block_ids = self._allocate_or_preempt(step, request, num_tokens)
            if new_block_ids is not None:
                step.add_running(request, num_tokens, new_block_ids)

    def _allocate_or_preempt(self, step: StepBuilder, request: Request, num_tokens: int) -> Sequence[int] | None:
        """Find blocks for a running request, at the cost of others; None if it had itself to give way."""
        while (new_block_ids := self._kv_cache.allocate(request, num_tokens)) is None:
            victim = self._choose_victim()
            self._preempt(step, victim)
            if victim is request:
                return None
        return new_block_ids

    def _choose_victim(self) -> Request:
        """FCFS: the last one admitted. Priority: the worst one, and of equals the last one admitted."""
        if self._config.policy == "fcfs":
            return self._running[-1]
        return max(reversed(self._running), key=lambda request: (request.priority, request.arrival_time))

    def _preempt(self, step: StepBuilder, victim: Request) -> None:
        """Take a request's blocks; it will be computed again. To the runner it ends here, and starts anew later."""
        step.cancel_running(victim)
        step.has_preempted = True
        self._kv_cache.free(victim)
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        victim.status = RequestStatus.PREEMPTED
        self._running = [request for request in self._running if request is not victim]
        self._removed_request_ids.append(victim.request_id)
        self._waiting.prepend(victim)
        self._num_preemptions += 1

    def _advance(self, request: Request, num_tokens: int) -> None:
        request.num_computed_tokens += num_tokens
        self._kv_cache.cache_full_blocks(request)

    # How many tokens

    def _num_tokens_to_continue(self, request: Request, token_budget: int) -> int:
        num_tokens = request.num_tokens - request.num_computed_tokens
        return min(num_tokens, self._max_chunk, token_budget)

    def _num_tokens_to_admit(self, request: Request, prefix: CachedPrefix, token_budget: int) -> int:
        """Return a waiting request's first share; 0: it has to wait for a step with more budget.

        Without chunked prefill a prompt goes whole or waits; one that is longer than any step's budget goes in pieces.
        """
        num_tokens = request.num_tokens - prefix.num_tokens
        is_splittable = self._config.enable_chunked_prefill or num_tokens > self._config.max_num_batched_tokens
        if num_tokens > token_budget and not is_splittable:
            return 0
        return min(num_tokens, self._max_chunk, token_budget)

    # What a step brought

    def _update_request(
        self, request: Request, num_scheduled_tokens: int, runner_output: RunnerOutput
    ) -> RequestOutput | None:
        request_id = request.request_id
        sampled_token_ids = runner_output.sampled_token_ids.get(request_id, ())
        is_computed = request.num_computed_tokens == request.num_tokens
        if bool(sampled_token_ids) != is_computed:
            raise RuntimeError(
                f"The runner sampled {len(sampled_token_ids)} tokens for request {request_id}, of which "
                f"{request.num_computed_tokens} of {request.num_tokens} tokens are computed."
            )
        is_first = request.num_output_tokens == 0
        new_token_ids = self._append_tokens(request, sampled_token_ids)
        prompt_logprobs: list[TokenLogprobs] = []
        if request.sampling_params.prompt_logprobs is not None:
            prompt_logprobs = _take_prompt_logprobs(request, num_scheduled_tokens, runner_output)
        if not new_token_ids and not prompt_logprobs and request.finish_reason is None:
            return None
        return RequestOutput(
            request_id=request_id,
            new_token_ids=new_token_ids,
            logprobs=list(runner_output.logprobs.get(request_id, ())[: len(new_token_ids)]),
            prompt_logprobs=prompt_logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            num_cached_tokens=request.num_cached_tokens if is_first else 0,
            scheduled_time=request.scheduled_time if is_first else None,
        )

    def _append_tokens(self, request: Request, sampled_token_ids: Sequence[int]) -> list[int]:
        """Append sampled tokens, up to the one that ends the request. Returns those appended."""
        new_token_ids: list[int] = []
        for token_id in sampled_token_ids:
            if request.max_tokens == 0:
                self._finish(request, Finish(FinishReason.LENGTH))
                break
            request.token_ids.append(token_id)
            new_token_ids.append(token_id)
            finish = find_finish(request, self._max_model_len)
            if finish is not None:
                self._finish(request, finish)
                break
        return new_token_ids

    def _finish(self, request: Request, finish: Finish) -> None:
        """End a request. The caller takes it out of its queue (`_forget_finished` for the running ones)."""
        if request.status is RequestStatus.RUNNING:
            self._removed_request_ids.append(request.request_id)
        request.status = RequestStatus.FINISHED
        request.finish_reason, request.stop_reason = finish
        self._kv_cache.free(request)
        del self._requests[request.request_id]

    def _forget_finished(self) -> None:
        self._running = [request for request in self._running if not request.is_finished]


def _max_chunk(config: SchedulerConfig) -> int:
    """Return the most tokens that one request gets in one step."""
    if config.enable_chunked_prefill and config.long_prefill_token_threshold > 0:
        return config.long_prefill_token_threshold
    return config.max_num_batched_tokens


def _take_prompt_logprobs(
    request: Request, num_scheduled_tokens: int, runner_output: RunnerOutput
) -> list[TokenLogprobs]:
    """Return the step's prompt log-probabilities that have not been sent before."""
    computed = runner_output.prompt_logprobs.get(request.request_id, ())
    start = request.num_computed_tokens - num_scheduled_tokens
    new = list(computed[max(0, request.num_sent_prompt_logprobs - start) :])
    request.num_sent_prompt_logprobs += len(new)
    return new
