"""The engine (batched, chunked, preempted, prefix-cached) says, token for token, what the one-request loop says."""

import random
from dataclasses import dataclass, field

import pytest
from engine_fakes import Answer, FakeRunner, make_engine_request, naive_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_storage import small_kv_cache

from quire_server.engine.core import EngineCore, EngineCoreConfig
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.shared.config import SchedulerConfig

MAX_MODEL_LEN = 64


@dataclass(frozen=True)
class Traffic:
    """Requests with the step at which each comes, and steps at which some are aborted."""

    arrivals: list[tuple[int, EngineRequest]]
    aborts: dict[int, list[str]] = field(default_factory=dict)


def run(core: EngineCore, traffic: Traffic, max_steps: int) -> dict[str, Answer]:
    answers = {request.request_id: Answer() for _, request in traffic.arrivals}
    last_event = max(step for step, _ in [*traffic.arrivals, *traffic.aborts.items()])
    for step in range(last_event + max_steps):
        for arrival, request in traffic.arrivals:
            if arrival == step:
                core.add_request(request)
        core.abort_requests(traffic.aborts.get(step, []))
        for output in core.step(float(step)):
            answers[output.request_id].add(output)
        core.check_integrity()
        if step >= last_event and not core.has_unfinished:
            return answers
    raise AssertionError(f"not done {max_steps} steps after the last event: {core._scheduler.request_ids}")


def num_blocks_needed(request: EngineRequest, block_size: int) -> int:
    max_tokens = request.sampling_params.max_tokens
    assert max_tokens is not None
    return -(-(len(request.prompt_token_ids) + max(0, max_tokens - 1)) // block_size)


def check(core: EngineCore, runner: FakeRunner, traffic: Traffic) -> None:
    num_tokens = sum(
        len(request.prompt_token_ids) + (request.sampling_params.max_tokens or 0) for _, request in traffic.arrivals
    )
    answers = run(core, traffic, max_steps=20 + (1 + len(traffic.arrivals)) * num_tokens)
    for _, request in traffic.arrivals:
        expected = naive_answer(request, max_model_len=MAX_MODEL_LEN, sliding_window=runner.sliding_window)
        answer = answers[request.request_id]
        if answer.finish_reason is FinishReason.ABORT:
            assert answer.token_ids == expected.token_ids[: len(answer.token_ids)]
        else:
            assert answer == expected
    assert core.stats().kv_cache_usage == 0.0
    assert runner.requests == {}


def make_engine(
    num_blocks: int, block_size: int, sliding_window: int | None = None, **scheduler: object
) -> tuple[EngineCore, FakeRunner]:
    runner = FakeRunner(num_blocks, block_size, sliding_window)
    config = EngineCoreConfig(
        scheduler=SchedulerConfig(**scheduler),
        max_model_len=MAX_MODEL_LEN,
        num_blocks=num_blocks,
        block_size=block_size,
        kv_cache=small_kv_cache(sliding_window),
    )
    return EngineCore(config, runner), runner


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    num_requests = draw(st.integers(1, 8))
    shared = list(range(100, 124))
    arrivals = []
    for number in range(num_requests):
        own = [number] * draw(st.integers(0, 6))
        prompt = [*shared[: draw(st.integers(0, len(shared)))], *own] or [1]
        max_tokens = draw(st.sampled_from([0, 1, 5, 16, 24, 32]))
        request = make_engine_request(
            f"r{number}",
            prompt,
            max_tokens=max_tokens,
            min_tokens=draw(st.integers(0, min(3, max_tokens))),
            eos_token_ids=draw(st.sampled_from([(), (), (5,)])),
            stop_token_ids=draw(st.sampled_from([(), (), (6,)])),
            logprobs=draw(st.sampled_from([None, 0])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
            priority=draw(st.integers(0, 2)),
            arrival_time=float(number),
            cache_salt=draw(st.sampled_from([None, None, None, "salt"])),
        )
        arrivals.append((draw(st.integers(0, 6)), request))
    request_ids = [request.request_id for _, request in arrivals]
    aborts = draw(st.dictionaries(st.integers(0, 30), st.lists(st.sampled_from(request_ids), max_size=2), max_size=2))
    return Traffic(arrivals, aborts)


@settings(max_examples=150)
@given(
    traffic=traffics(),
    block_size=st.sampled_from([1, 2, 4, 16]),
    num_spare_blocks=st.integers(0, 6),
    sliding_window=st.none() | st.none() | st.integers(1, 20),
    budget=st.integers(1, 64),
    max_num_seqs=st.integers(1, 8),
    enable_chunked_prefill=st.booleans(),
    threshold=st.sampled_from([0, 0, 5]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_the_engine_equals_the_naive_loop(
    traffic,
    block_size,
    num_spare_blocks,
    sliding_window,
    budget,
    max_num_seqs,
    enable_chunked_prefill,
    threshold,
    policy,
) -> None:
    core, runner = make_engine(
        1 + max(num_blocks_needed(request, block_size) for _, request in traffic.arrivals) + num_spare_blocks,
        block_size,
        sliding_window,
        max_num_batched_tokens=budget,
        max_num_seqs=min(max_num_seqs, budget),
        enable_chunked_prefill=enable_chunked_prefill,
        long_prefill_token_threshold=threshold,
        policy=policy,
    )
    check(core, runner, traffic)


@pytest.mark.parametrize("seed", range(40))
def test_crowds_equal_the_naive_loop(seed: int) -> None:
    """Many requests, little cache: hypothesis likes its examples small, so these are drawn evenly."""
    draw = random.Random(seed)
    block_size = draw.choice([1, 2, 4, 16])
    budget = draw.choice([4, 8, 16, 64])
    arrivals = []
    for number in range(12):
        shared = list(range(100, 100 + draw.randint(0, 24)))
        request = make_engine_request(
            f"r{number}",
            [*shared, *[number] * draw.randint(1, 4)],
            max_tokens=draw.randint(8, 32),
            priority=draw.randint(0, 2),
            arrival_time=float(number),
            prompt_logprobs=draw.choice([None, None, 0]),
        )
        arrivals.append((draw.randint(0, 10), request))
    aborts = {draw.randint(0, 60): [f"r{draw.randint(0, 11)}"] for _ in range(2)}
    num_blocks = 1 + max(num_blocks_needed(request, block_size) for _, request in arrivals) + draw.randint(0, 8)
    core, runner = make_engine(
        num_blocks,
        block_size,
        draw.choice([None, None, 7]),
        max_num_batched_tokens=budget,
        max_num_seqs=draw.randint(2, min(8, budget)),
        enable_chunked_prefill=draw.choice([True, True, False]),
        long_prefill_token_threshold=draw.choice([0, 0, 5]),
        policy=draw.choice(["fcfs", "priority"]),
    )
    check(core, runner, Traffic(arrivals, aborts))


def same_prompt_traffic(num_requests: int = 6) -> Traffic:
    """Prompts of one family that all come at once and all outgrow the cache together."""
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    requests = [
        make_engine_request(f"r{number}", [*prompt, number], max_tokens=20, arrival_time=float(number))
        for number in range(num_requests)
    ]
    return Traffic([(0, request) for request in requests])


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("budget", [1, 3, 8, 64])
@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_preemption_and_prefix_hits_really_happen_and_change_no_token(
    block_size: int, budget: int, policy: str
) -> None:
    traffic = same_prompt_traffic()
    num_blocks = 1 + num_blocks_needed(traffic.arrivals[0][1], block_size) * 2
    core, runner = make_engine(
        num_blocks, block_size, max_num_batched_tokens=budget, max_num_seqs=min(6, budget), policy=policy
    )
    check(core, runner, traffic)
    stats = core.stats()
    if budget >= 3 and block_size < 16:
        assert stats.num_preemptions > 0
    if block_size < 16:
        assert stats.prefix_cache_hits > 0


def test_a_sliding_window_lets_long_answers_run_in_a_cache_that_could_not_hold_them() -> None:
    requests = [make_engine_request(f"r{number}", [number], max_tokens=60) for number in range(3)]
    core, runner = make_engine(13, 2, 5, max_num_batched_tokens=4, max_num_seqs=3)
    check(core, runner, Traffic([(0, request) for request in requests]))
    assert core.stats().num_preemptions == 0
