"""The scheduler under random adds, aborts, resets and steps, with the fake runner computing every token for real."""

from collections import deque

from engine_fakes import Answer, FakeRunner, make_engine_request, make_manager, naive_answer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire_server.engine.output import EngineCoreOutput
from quire_server.engine.request import EngineRequest, RequestStatus
from quire_server.engine.scheduler import Scheduler
from quire_server.engine.step import RunnerOutput, SchedulerOutput
from quire_server.shared.config import SchedulerConfig
from quire_server.shared.errors import InvalidRequestError

REQUEST_IDS = [f"r{number}" for number in range(8)]
MAX_MODEL_LEN = 40
SHARED_PROMPT = list(range(100, 120))


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(16, 56),
        block_size=st.sampled_from([1, 2, 4, 16]),
        sliding_window=st.none() | st.none() | st.integers(1, 9),
        budget=st.sampled_from([1, 2, 4, 8, 16, 24]),
        max_num_seqs=st.sampled_from([1, 2, 4, 6]),
        enable_chunked_prefill=st.booleans(),
        threshold=st.sampled_from([0, 0, 3]),
        policy=st.sampled_from(["fcfs", "priority"]),
        max_in_flight=st.sampled_from([1, 2, 3, 4]),
        num_drafts=st.sampled_from([0, 0, 1, 3]),
    )
    def start(
        self,
        capacity,
        block_size,
        sliding_window,
        budget,
        max_num_seqs,
        enable_chunked_prefill,
        threshold,
        policy,
        max_in_flight,
        num_drafts,
    ) -> None:
        num_blocks = 1 + capacity // block_size
        self.max_in_flight = max_in_flight
        self.config = SchedulerConfig(
            max_num_batched_tokens=budget,
            max_num_seqs=min(max_num_seqs, budget),
            enable_chunked_prefill=enable_chunked_prefill,
            long_prefill_token_threshold=threshold,
            policy=policy,
        )
        self.manager = make_manager(
            num_blocks, block_size, max_num_batched_tokens=budget, sliding_window=sliding_window
        )
        self.scheduler = Scheduler(self.config, self.manager, MAX_MODEL_LEN)
        self.runner = FakeRunner(num_blocks, block_size, sliding_window, num_drafts=num_drafts)
        self.in_flight: deque[tuple[SchedulerOutput, RunnerOutput]] = deque()
        self.blockers: dict[str, set[str]] = {}
        self.were_blocked: set[float] = set()
        self.live: dict[str, tuple[EngineRequest, Answer, int]] = {}
        self.num_added = 0
        self.num_computed: dict[str, tuple[int, int]] = {}
        self.has_rejected = False

    # What may happen

    @rule(data=st.data(), num_requests=st.integers(1, 4))
    def add(self, data: st.DataObject, num_requests: int) -> None:
        for _ in range(min(num_requests, len(REQUEST_IDS) - len(self.live))):
            self.add_one(data)

    def add_one(self, data: st.DataObject) -> None:
        num_shared, num_own = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 3))
        prompt = [*SHARED_PROMPT[:num_shared], *[self.num_added] * num_own] or [self.num_added]
        max_tokens = data.draw(st.integers(0, 24))
        request = make_engine_request(
            data.draw(st.sampled_from([name for name in REQUEST_IDS if name not in self.live])),
            prompt,
            max_tokens=max_tokens,
            priority=data.draw(st.integers(0, 2)),
            cache_salt=data.draw(st.sampled_from([None, None, None, "salt"])),
            arrival_time=float(self.num_added),
            prompt_logprobs=data.draw(st.sampled_from([None, None, None, 0])),
            eos_token_ids=data.draw(st.sampled_from([(), (), (3,)])),
            stop_token_ids=data.draw(st.sampled_from([(), (), (4,)])),
        )
        self.num_added += 1
        blockers = data.draw(st.sampled_from([(), (), (), ("grammar",), ("grammar", "adapter")]))
        num_kv_tokens = len(prompt) + max(0, max_tokens - 1)
        is_possible = len(prompt) <= MAX_MODEL_LEN - max_tokens and self.manager.fits_alone(num_kv_tokens)
        try:
            self.scheduler.add_request(request, blockers)
        except InvalidRequestError:
            assert not is_possible
        else:
            assert is_possible
            self.live[request.request_id] = (request, Answer(), self.runner.weights)
            if blockers:
                self.blockers[request.request_id] = set(blockers)
                self.were_blocked.add(request.arrival_time)

    @precondition(lambda self: self.blockers)
    @rule(data=st.data())
    def unblock(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.blockers)))
        blocker = data.draw(st.sampled_from(["adapter", "grammar", "nothing of the kind"]))
        self.scheduler.unblock(request_id, blocker)
        self.scheduler.unblock("unknown", blocker)
        self.blockers[request_id].discard(blocker)
        if not self.blockers[request_id]:
            del self.blockers[request_id]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_requests=st.sampled_from([1, 1, 1, 3]))
    def abort(self, data: st.DataObject, num_requests: int) -> None:
        request_ids = data.draw(st.sets(st.sampled_from(sorted(self.live)), min_size=1, max_size=num_requests))
        assert set(self.scheduler.abort_requests([*request_ids, "unknown"])) == request_ids
        for request_id in request_ids:
            del self.live[request_id]
            self.num_computed.pop(request_id, None)
            self.blockers.pop(request_id, None)

    @precondition(lambda self: self.scheduler.stats().num_steps % 16 == 15)
    @rule()
    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()
        self.runner.weights += 1

    @precondition(lambda self: len(self.in_flight) < self.max_in_flight)
    @rule()
    def begin_step(self) -> None:
        """Schedule a step; the runner may be done with it at once, but nobody hears of it yet."""
        scheduler_output = self.scheduler.schedule(now=0.0)
        scheduled = scheduler_output.num_scheduled_tokens
        assert all(num_tokens > 0 for num_tokens in scheduled.values())
        assert sum(scheduled.values()) <= self.config.max_num_batched_tokens
        assert not scheduled.keys() & self.blockers.keys()
        is_somebody_ready = bool(self.live.keys() - self.blockers.keys())
        assert scheduled or self.in_flight or not is_somebody_ready, "live requests, and nobody gets on"
        self.in_flight.append((scheduler_output, self.runner.execute(scheduler_output)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def finish_step(self) -> None:
        scheduler_output, runner_output = self.in_flight.popleft()
        for share in scheduler_output.scheduled:
            num_sampled = len(runner_output.sampled_token_ids.get(share.request_id, ()))
            self.has_rejected = self.has_rejected or num_sampled < share.num_samples
        for output in self.scheduler.update_from_output(scheduler_output, runner_output):
            self.hear(output)

    @rule(num_steps=st.integers(1, 12))
    def several_steps(self, num_steps: int) -> None:
        """As the engine does it: the oldest result is taken when as many steps as allowed are in flight."""
        for _ in range(num_steps):
            if len(self.in_flight) == self.max_in_flight:
                self.finish_step()
            self.begin_step()
            if len(self.in_flight) == self.max_in_flight or not self.in_flight[-1][0].scheduled:
                self.finish_step()
            self.scheduler.check_integrity()

    def hear(self, output: EngineCoreOutput) -> None:
        request, answer, weights = self.live[output.request_id]
        answer.add(output)
        if answer.finish_reason is None:
            return
        if weights == self.runner.weights:
            expected = naive_answer(request, sliding_window=self.runner.sliding_window, weights=weights)
            assert answer == expected
        del self.live[output.request_id]
        self.num_computed.pop(output.request_id, None)

    # What always holds

    @invariant()
    def the_scheduler_agrees_with_itself(self) -> None:
        self.scheduler.check_integrity()
        assert set(self.scheduler.request_ids) == set(self.live)
        assert len(self.scheduler._running) <= self.config.max_num_seqs

    @invariant()
    def computed_tokens_fall_back_by_preemption_or_wrong_drafts_alone(self) -> None:
        for request in self.scheduler._requests.values():
            num_computed, num_preemptions = self.num_computed.get(request.request_id, (0, 0))
            if request.num_preemptions == num_preemptions and not self.has_rejected:
                assert request.num_computed_tokens >= num_computed
            if request.status is RequestStatus.PREEMPTED:
                assert request.num_computed_tokens == 0
            self.num_computed[request.request_id] = (request.num_computed_tokens, request.num_preemptions)
        self.has_rejected = False

    @invariant()
    def blocks_are_named_by_known_tokens_alone(self) -> None:
        for request in self.scheduler._running:
            assert len(request.block_hashes) * self.manager._block_size <= request.num_tokens
            table = self.manager._tables[request.request_id]
            assert table.num_cached_blocks * self.manager._block_size <= request.num_tokens

    @invariant()
    def nobody_is_overtaken(self) -> None:
        """Among the waiting by nobody; and who never stood aside, by nobody who runs either."""
        waiting = list(self.scheduler._waiting)
        if self.config.policy == "fcfs":
            order = [request.arrival_time for request in waiting]
            queue = [*self.scheduler._running, *waiting]
            arrivals = [request.arrival_time for request in queue if request.arrival_time not in self.were_blocked]
            assert arrivals == sorted(arrivals)
        else:
            order = [(request.priority, request.arrival_time) for request in waiting]
        assert order == sorted(order)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for request_id, blockers in self.blockers.items():
            for blocker in blockers:
                self.scheduler.unblock(request_id, blocker)
        self.blockers = {}
        while self.in_flight:
            self.finish_step()
        num_tokens = sum(request.num_tokens + request.max_tokens for request in self.scheduler._requests.values())
        for _ in range((1 + len(self.live)) * num_tokens * self.max_in_flight):
            if not self.live:
                break
            self.several_steps(1)
        assert not self.live, "every request that was let in ends"
        self.several_steps(1)
        while self.in_flight:
            self.finish_step()
        assert self.runner.requests == {}
        assert self.manager.usage == 0.0
        assert not self.scheduler.has_unfinished


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=30)
