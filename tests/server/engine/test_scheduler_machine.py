"""The scheduler under random adds, aborts, resets and steps, with the fake runner computing every token for real."""

import pytest
from engine_fakes import Answer, FakeRunner, make_engine_request, make_manager, naive_answer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire_server.config import SchedulerConfig
from quire_server.engine.output import RequestOutput, RunnerOutput, SchedulerOutput
from quire_server.engine.request import EngineRequest, RequestStatus
from quire_server.engine.scheduler import Scheduler
from quire_server.errors import InvalidRequestError

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
    )
    def start(
        self, capacity, block_size, sliding_window, budget, max_num_seqs, enable_chunked_prefill, threshold, policy
    ) -> None:
        num_blocks = 1 + capacity // block_size
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
        self.runner = FakeRunner(num_blocks, block_size, sliding_window)
        self.in_flight: tuple[SchedulerOutput, RunnerOutput] | None = None
        self.live: dict[str, tuple[EngineRequest, Answer, int]] = {}
        self.num_added = 0
        self.num_computed: dict[str, tuple[int, int]] = {}

    # What may happen

    @rule(data=st.data(), num_requests=st.integers(1, 4))
    def add(self, data: st.DataObject, num_requests: int) -> None:
        for _ in range(min(num_requests, len(REQUEST_IDS) - len(self.live))):
            self.add_one(data)

    def add_one(self, data: st.DataObject) -> None:
        num_shared, num_own = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 3))
        prompt = [*SHARED_PROMPT[:num_shared], *[self.num_added] * num_own]
        if not prompt:
            with pytest.raises(InvalidRequestError, match="empty"):
                make_engine_request("never built", prompt)
            return
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
        num_kv_tokens = len(prompt) + max(0, max_tokens - 1)
        is_possible = 0 < len(prompt) <= MAX_MODEL_LEN - max_tokens and self.manager.fits_alone(num_kv_tokens)
        try:
            self.scheduler.add_request(request)
        except InvalidRequestError:
            assert not is_possible
        else:
            assert is_possible
            self.live[request.request_id] = (request, Answer(), self.runner.weights)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_requests=st.sampled_from([1, 1, 1, 3]))
    def abort(self, data: st.DataObject, num_requests: int) -> None:
        request_ids = data.draw(st.sets(st.sampled_from(sorted(self.live)), min_size=1, max_size=num_requests))
        assert set(self.scheduler.abort_requests([*request_ids, "unknown"])) == request_ids
        for request_id in request_ids:
            del self.live[request_id]
            self.num_computed.pop(request_id, None)

    @precondition(lambda self: self.scheduler.stats().num_steps % 16 == 15)
    @rule()
    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()
        self.runner.weights += 1

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def begin_step(self) -> None:
        scheduler_output = self.scheduler.schedule(now=0.0)
        scheduled = scheduler_output.num_scheduled_tokens
        assert all(num_tokens > 0 for num_tokens in scheduled.values())
        assert sum(scheduled.values()) <= self.config.max_num_batched_tokens
        assert scheduled or not self.live, "live requests, and nobody gets on"
        self.in_flight = scheduler_output, self.runner.execute(scheduler_output)

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def finish_step(self) -> None:
        assert self.in_flight is not None
        for output in self.scheduler.update_from_output(*self.in_flight):
            self.hear(output)
        self.in_flight = None

    @precondition(lambda self: self.in_flight is None and self.live)
    @rule(num_steps=st.integers(1, 12))
    def several_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.begin_step()
            self.finish_step()
            self.scheduler.check_integrity()

    def hear(self, output: RequestOutput) -> None:
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
    def computed_tokens_fall_back_by_preemption_alone(self) -> None:
        for request in self.scheduler._requests.values():
            num_computed, num_preemptions = self.num_computed.get(request.request_id, (0, 0))
            if request.num_preemptions == num_preemptions:
                assert request.num_computed_tokens >= num_computed
            if request.status is RequestStatus.PREEMPTED:
                assert request.num_computed_tokens == 0
            self.num_computed[request.request_id] = (request.num_computed_tokens, request.num_preemptions)

    @invariant()
    def nobody_is_overtaken(self) -> None:
        if self.config.policy == "fcfs":
            order = [request.arrival_time for request in [*self.scheduler._running, *self.scheduler._waiting]]
        else:
            order = [(request.priority, request.arrival_time) for request in self.scheduler._waiting]
        assert order == sorted(order)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        if self.in_flight is not None:
            self.finish_step()
        num_tokens = sum(request.num_tokens + request.max_tokens for request in self.scheduler._requests.values())
        for _ in range((1 + len(self.live)) * num_tokens):
            if not self.live:
                break
            self.several_steps(1)
        assert not self.live, "every request that was let in ends"
        self.several_steps(1)
        assert self.runner.requests == {}
        assert self.manager.usage == 0.0
        assert not self.scheduler.has_unfinished


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=30)
