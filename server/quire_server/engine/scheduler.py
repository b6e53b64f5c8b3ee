"""Which requests get how many tokens in the next step, and what a step's tokens mean for them.

Owns every live request, the waiting queue, the running list and those that are blocked. Asks the KV cache manager for
room and does not know how blocks are kept; does not know the runner, nor what time it is (`now` is an argument).

There are no phases. `num_computed_tokens` of each request chases its tokens; a step hands out one token budget, to
running requests first and then to waiting ones. A prompt, a chunk of one, a decode and a recomputation are the same.
Under the priority policy the budget goes by rank, and a waiting request goes before the running ones that have a worse
priority: it takes seats and blocks from them where it must.

Steps may be scheduled before the results of earlier ones are there: each carries all that `update_from_output` needs,
and results come in the order of the steps.

Invariants:
* A live request is in exactly one place: the waiting queue (waiting, preempted), the running list (running), or among
  the blocked. Nobody waits for a blocked request.
* Tokens scheduled in a step ≤ max_num_batched_tokens; running requests ≤ max_num_seqs.
* `num_computed_tokens` is advanced when a step is scheduled. It falls back to 0 by preemption, and by as many tokens as
  drafts were wrong when their step ends.
* What was let in fits alone, so the first of the running (FCFS) or the best of them (priority) always gets its blocks:
  with no step in flight, a step schedules at least one token as long as any live request is not blocked.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import count

from quire_server.engine.admission import refuse_if_impossible
from quire_server.engine.kv_cache_manager import NO_PREFIX, CachedPrefix, KVCacheManager
from quire_server.engine.output import EngineCoreOutput, SchedulerStats
from quire_server.engine.progress import build_output, record_progress
from quire_server.engine.request import EngineRequest, Request, RequestStatus
from quire_server.engine.request_queue import RequestQueue, rank_by
from quire_server.engine.shares import (
    Share,
    ShareRules,
    is_complete_in_flight,
    share_of_running,
    share_of_waiting,
    without_drafts,
)
from quire_server.engine.step import RunnerOutput, ScheduledRequest, SchedulerOutput
from quire_server.engine.step_builder import StepBuilder
from quire_server.shared.config import SchedulerConfig
from quire_server.shared.errors import InvalidRequestError

_WATERMARK = 0.01
"""Share of blocks that an admission leaves free for running requests to grow into."""


class Scheduler:
    """Decides each step's work. See the module for the invariants."""

    def __init__(self, config: SchedulerConfig, kv_cache: KVCacheManager, max_model_len: int) -> None:
        self._config = config
        self._kv_cache = kv_cache
        self._max_model_len = max_model_len
        self._rules = ShareRules.from_config(config, max_model_len)
        self._is_by_priority = config.policy == "priority"
        self._requests: dict[str, Request] = {}
        self._rank = rank_by(config.policy)
        self._waiting = RequestQueue(self._rank)
        self._running: list[Request] = []
        self._blocked: dict[str, Request] = {}
        self._removed_request_ids: list[str] = []
        self._sequence_numbers = count()
        self._epochs = count(1)
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

    def add_request(self, engine_request: EngineRequest, blockers: Collection[str] = ()) -> None:
        """Let a request wait for its turn.

        Args:
            blockers: names of what has to be there first (a grammar, an adapter, KV from elsewhere); the request stands
                aside until each of them is told to `unblock`.

        Raises:
            ContextLengthError: prompt and answer are longer than the model's context.
            InvalidRequestError: the request could never run, or its id is in use.
        """
        request = Request.from_engine_request(engine_request)
        if request.request_id in self._requests:
            raise InvalidRequestError(f"The request id {request.request_id!r} is already in use.", "request_id")
        refuse_if_impossible(request, self._kv_cache, self._max_model_len)
        request.sequence_number = next(self._sequence_numbers)
        self._requests[request.request_id] = request
        if blockers:
            request.blockers.update(blockers)
            request.status = RequestStatus.BLOCKED
            self._blocked[request.request_id] = request
        else:
            self._waiting.add(request)

    def unblock(self, request_id: str, blocker: str) -> None:
        """Say that a request need not wait for `blocker` any more. One that is gone by now is ignored."""
        request = self._blocked.get(request_id)
        if request is None:
            return
        request.blockers.discard(blocker)
        if not request.blockers:
            del self._blocked[request_id]
            request.status = RequestStatus.WAITING
            self._waiting.add(request)

    def abort_requests(self, request_ids: Iterable[str]) -> list[str]:
        """End requests at once, wherever they are. Returns the ids of those that were live; others are ignored.

        Tokens that a step in flight still samples for them are dropped.
        """
        aborted = [
            self._requests[request_id] for request_id in dict.fromkeys(request_ids) if request_id in self._requests
        ]
        for request in aborted:
            if request.status is RequestStatus.BLOCKED:
                del self._blocked[request.request_id]
            elif request.status is not RequestStatus.RUNNING:
                self._waiting.remove(request)
            self._finish(request)
        self._forget_finished()
        return [request.request_id for request in aborted]

    # A step: schedule, then (once the runner has run) update

    def schedule(self, now: float) -> SchedulerOutput:
        """Choose the next step's work. The caller has it run, and calls `update_from_output` in the order of steps."""
        step = StepBuilder(self._config.max_num_batched_tokens)
        contenders = deque(self._running)
        if self._is_by_priority:
            contenders = deque(sorted(contenders, key=self._rank))
            self._schedule_by_priority(step, contenders, now)
        while contenders and step.token_budget > 0:
            self._continue(step, contenders.popleft(), contenders)
        self._admit_waiting(step, now)
        removed_request_ids, self._removed_request_ids = self._removed_request_ids, []
        scheduler_output = step.build(removed_request_ids, self._kv_cache.take_block_copies())
        self._step_num_tokens = scheduler_output.total_num_scheduled_tokens
        self._num_steps += self._step_num_tokens > 0
        return scheduler_output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, runner_output: RunnerOutput
    ) -> list[EngineCoreOutput]:
        """Give each request the tokens that the step made for it, and end those that are done."""
        outputs = []
        has_finished = False
        for share in scheduler_output.scheduled:
            request = self._requests.get(share.request_id)
            if request is None or request.epoch != share.epoch:
                continue  # Aborted or preempted since; perhaps its id has been used again.
            progress = record_progress(request, share, runner_output, self._max_model_len)
            if progress.new_token_ids:
                self._kv_cache.cache_full_blocks(request)
            output = build_output(request, progress)
            if output is not None:
                outputs.append(output)
            if progress.finish is not None:
                self._finish(request)
                has_finished = True
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
            num_waiting=len(self._waiting) + len(self._blocked),
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
        assert len(waiting) + len(running) + len(self._blocked) == len(self._requests)
        assert waiting | running | self._blocked.keys() == self._requests.keys()
        assert all(request.status is RequestStatus.RUNNING for request in self._running)
        assert all(request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) for request in self._waiting)
        assert all(request.status is RequestStatus.BLOCKED and request.blockers for request in self._blocked.values())
        assert all(request.num_computed_tokens == request.num_pending_tokens == 0 for request in self._waiting)
        for request in self._running:
            assert request.num_pending_tokens >= 0
            assert 0 < request.num_computed_tokens <= request.num_tokens + request.num_pending_tokens
        if not self._requests:
            assert self._kv_cache.usage == 0.0

    # Admission

    def _admit_waiting(self, step: StepBuilder, now: float) -> None:
        """Admit waiting requests in their order, until one does not fit."""
        if not self._waiting or not self._has_seat(step):
            return
        num_reserved_blocks = self._num_reserved_blocks(self._running)
        while self._waiting and self._has_seat(step):
            request = self._waiting.peek()
            if not self._admit(step, request, num_reserved_blocks, now):
                break
            num_reserved_blocks += self._kv_cache.num_missing_blocks(request)

    def _schedule_by_priority(self, step: StepBuilder, contenders: deque[Request], now: float) -> None:
        """Continue running requests, best first, and let waiting ones in before those that they outrank.

        Ends when nobody who waits outranks anybody who is left in `contenders`, or does not fit.
        """
        while contenders and step.token_budget > 0 and self._waiting:
            request = self._waiting.peek()
            if request.priority >= contenders[-1].priority:
                return
            if request.priority < contenders[0].priority:
                if not self._admit_before(step, request, contenders, now):
                    return
            else:
                self._continue(step, contenders.popleft(), contenders)

    def _admit_before(self, step: StepBuilder, request: Request, contenders: deque[Request], now: float) -> bool:
        """Admit a waiting request that outranks all contenders; for its room, preempt the worst of them."""
        behind = {each.request_id for each in contenders if not is_complete_in_flight(self._rules, each)}
        ahead = [each for each in self._running if each.request_id not in behind]
        num_reserved_blocks = self._num_reserved_blocks(ahead)
        is_worth_it = False
        while not (self._has_seat(step) and self._admit(step, request, num_reserved_blocks, now)):
            is_worth_it = is_worth_it or self._fits_beside(step, request, ahead, num_reserved_blocks)
            victim = self._take_victim(contenders) if is_worth_it else None
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _fits_beside(self, step: StepBuilder, request: Request, ahead: list[Request], num_reserved_blocks: int) -> bool:
        """Say whether a waiting request would be admitted if only those ahead of it were running."""
        prefix, share = self._first_share(step, request)
        num_watermark_blocks = self._num_watermark_blocks if ahead else 0
        num_reserved_blocks += num_watermark_blocks
        return share.num_tokens > 0 and self._kv_cache.fits_beside(request, prefix, ahead, num_reserved_blocks)

    def _take_victim(self, contenders: deque[Request]) -> Request | None:
        """Take out the worst of the contenders; one that ends with the steps in flight keeps what it has."""
        for index in range(len(contenders) - 1, -1, -1):
            victim = contenders[index]
            if not is_complete_in_flight(self._rules, victim):
                del contenders[index]
                return victim
        return None

    def _has_seat(self, step: StepBuilder) -> bool:
        return step.token_budget > 0 and len(self._running) < self._config.max_num_seqs

    def _num_reserved_blocks(self, requests: Iterable[Request]) -> int:
        """Return how many blocks requests still need for the tokens that they have."""
        return sum(
            self._kv_cache.num_missing_blocks(request)
            for request in requests
            if request.num_computed_tokens < request.num_tokens
        )

    def _admit(self, step: StepBuilder, request: Request, num_reserved_blocks: int, now: float) -> bool:
        """Admit the first of the waiting, if its whole sequence fits beside what others still need for theirs.

        A prompt that is admitted chunk by chunk would otherwise be preempted, or preempt, halfway.
        """
        prefix, share = self._first_share(step, request)
        num_watermark_blocks = self._num_watermark_blocks if self._running else 0
        has_room = self._kv_cache.can_admit(request, prefix, num_reserved_blocks + num_watermark_blocks)
        if share.num_tokens == 0 or not has_room:
            return False
        block_ids = self._kv_cache.allocate(request, share.num_tokens, prefix)
        assert block_ids is not None, "what can be admitted can be allocated"
        self._waiting.pop()
        self._running.append(request)
        request.status = RequestStatus.RUNNING
        request.epoch = next(self._epochs)
        request.num_computed_tokens = prefix.num_tokens
        if request.scheduled_time is None:
            request.scheduled_time = now
            self._count_prefix_hit(request, prefix)
        step.introduce(request)
        self._give(step, request, share, block_ids)
        return True

    def _first_share(self, step: StepBuilder, request: Request) -> tuple[CachedPrefix, Share]:
        """Return what the cache holds of a waiting request, and what it would get of the rest."""
        prefix = NO_PREFIX
        if request.sampling_params.prompt_logprobs is None:  # a position that is not computed has no logits
            prefix = self._kv_cache.find_cached_prefix(request)
        return prefix, share_of_waiting(self._rules, request, prefix.num_tokens, step.token_budget)

    def _count_prefix_hit(self, request: Request, prefix: CachedPrefix) -> None:
        request.num_cached_tokens = prefix.num_tokens
        if request.sampling_params.prompt_logprobs is None:
            self._prefix_cache_queries += request.num_tokens
            self._prefix_cache_hits += prefix.num_tokens

    # Running requests

    def _continue(self, step: StepBuilder, request: Request, behind: deque[Request]) -> None:
        """Give a running request its next tokens; where blocks are short, at the cost of those behind it."""
        share = share_of_running(self._rules, request, step.token_budget)
        if share.num_tokens == 0:
            return
        while (new_block_ids := self._kv_cache.allocate(request, share.num_tokens)) is None:
            if share.draft_token_ids:
                share = without_drafts(share)
                continue
            victim = self._take_victim(behind) or request
            self._preempt(victim)
            if victim is request:
                return
        self._give(step, request, share, new_block_ids)

    def _give(self, step: StepBuilder, request: Request, share: Share, new_block_ids: Sequence[int]) -> None:
        """Put a request's share into the step, and count it as computed from now on."""
        step.add(
            ScheduledRequest(
                request_id=request.request_id,
                epoch=request.epoch,
                first_position=request.num_computed_tokens,
                num_tokens=share.num_tokens,
                num_samples=share.num_samples,
                draft_token_ids=share.draft_token_ids,
                new_block_ids=new_block_ids,
            )
        )
        request.num_computed_tokens += share.num_tokens
        request.num_pending_tokens += share.num_samples
        request.has_drafts_in_flight = bool(share.draft_token_ids)
        request.draft_token_ids = ()
        self._kv_cache.cache_full_blocks(request)

    def _preempt(self, victim: Request) -> None:
        """Take a request's blocks; it will be computed again. To the runner it ends here, and starts anew later.

        What steps in flight still make for it is dropped: it is made again, and the same.
        """
        self._kv_cache.free(victim)
        victim.epoch = next(self._epochs)
        victim.num_computed_tokens = victim.num_pending_tokens = 0
        victim.has_drafts_in_flight, victim.draft_token_ids = False, ()
        victim.num_preemptions += 1
        victim.status = RequestStatus.PREEMPTED
        self._running = [request for request in self._running if request is not victim]
        self._removed_request_ids.append(victim.request_id)
        self._waiting.add(victim)
        self._num_preemptions += 1

    # Ends

    def _finish(self, request: Request) -> None:
        """End a request. The caller takes it out of its queue (`_forget_finished` for the running ones)."""
        if request.status is RequestStatus.RUNNING:
            self._removed_request_ids.append(request.request_id)
        request.status = RequestStatus.FINISHED
        self._kv_cache.free(request)
        del self._requests[request.request_id]

    def _forget_finished(self) -> None:
        self._running = [request for request in self._running if not request.is_finished]
