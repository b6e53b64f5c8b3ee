"""Steps that are scheduled before the results of earlier ones are there; drafts that turn out wrong."""

from collections import deque

import pytest
from engine_fakes import (
    Answer,
    FakeRunner,
    make_engine_request,
    make_scheduler,
    naive_answer,
    token_logprobs,
)
from engine_fakes import SchedulerDriver as Driver
from kv_storage import small_kv_cache

from quire_server.engine.core import EngineCore, EngineCoreConfig
from quire_server.engine.request import FinishReason
from quire_server.engine.step import RunnerOutput, SchedulerOutput
from quire_server.shared.config import SchedulerConfig


def test_a_decode_goes_on_before_its_last_token_is_known() -> None:
    driver = Driver(make_scheduler())
    driver.add("a", 3)
    steps = [driver.schedule() for _ in range(3)]
    shares = [step.scheduled[0] for step in steps]
    assert [(share.first_position, share.num_tokens, share.num_samples) for share in shares] == [
        (0, 3, 1),
        (3, 1, 1),
        (4, 1, 1),
    ]
    outputs = [driver.update(step, {"a": [token_id]})["a"] for token_id, step in zip((5, 6, 8), steps, strict=True)]
    assert [output.new_token_ids for output in outputs] == [[5], [6], [8]]


def test_a_prompt_goes_on_chunk_by_chunk() -> None:
    driver = Driver(make_scheduler(max_num_batched_tokens=8))
    driver.add("a", 20)
    shares = [driver.schedule().scheduled[0] for _ in range(4)]
    assert [(share.first_position, share.num_tokens, share.num_samples) for share in shares] == [
        (0, 8, 0),
        (8, 8, 0),
        (16, 4, 1),
        (20, 1, 1),
    ]


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(2, 1000), (50, 52)])
def test_nothing_is_computed_beyond_the_last_token_that_was_asked_for(max_tokens: int, max_model_len: int) -> None:
    driver = Driver(make_scheduler(max_model_len=max_model_len))
    driver.add("a", max_model_len - max_tokens if max_tokens == 50 else 3, max_tokens=max_tokens)
    num_shares = 0
    while driver.schedule().scheduled:
        num_shares += 1
    assert num_shares == max_tokens


def test_a_request_that_ended_meanwhile_gets_no_token_more() -> None:
    driver = Driver(make_scheduler())
    driver.add("a", 3, eos_token_ids=(5,))
    first, second = driver.schedule(), driver.schedule()
    assert driver.update(first, {"a": [5]})["a"].finish_reason is FinishReason.STOP
    assert driver.update(second, {"a": [6]}) == {}


def test_an_id_that_is_used_again_does_not_take_an_older_step_s_tokens() -> None:
    driver = Driver(make_scheduler())
    driver.add("a", 3)
    old = driver.schedule()
    driver.scheduler.abort_requests(["a"])
    driver.add("a", 4)
    new = driver.schedule()
    assert driver.update(old, {"a": [5]}) == {}
    assert driver.update(new, {"a": [6]})["a"].new_token_ids == [6]


def test_a_request_that_was_preempted_makes_the_dropped_token_again() -> None:
    driver = Driver(make_scheduler(num_blocks=5, block_size=4))
    for request_id in "ab":
        driver.add(request_id, 7, max_tokens=9)
    driver.step({"a": [1], "b": [2]})
    old = driver.schedule()
    assert [share.request_id for share in old.scheduled] == ["a", "b"]
    preempting = driver.schedule()
    assert [share.request_id for share in preempting.scheduled] == ["a"]
    assert driver.update(old, {"a": [3], "b": [4]}).keys() == {"a"}
    driver.update(preempting, {"a": [5]})
    driver.scheduler.abort_requests(["a"])
    scheduler_output = driver.schedule()
    assert scheduler_output.new_requests[0].token_ids[7:] == [2]
    assert driver.update(scheduler_output, {"b": [4]})["b"].new_token_ids == [4]


def test_prompt_logprobs_are_counted_by_the_step_that_made_them() -> None:
    driver = Driver(make_scheduler(max_num_batched_tokens=8))
    driver.add("a", 10, prompt_logprobs=0)
    logprobs = [token_logprobs(position, position) for position in range(9)]
    first, second, third = driver.schedule(), driver.schedule(), driver.schedule()
    outputs = [
        driver.update(first, prompt_logprobs={"a": logprobs[:8]})["a"],
        driver.update(second, prompt_logprobs={"a": logprobs[8:]})["a"],
        driver.update(third)["a"],
    ]
    assert [output.prompt_logprobs for output in outputs] == [logprobs[:8], logprobs[8:], []]


def test_a_block_gets_its_name_when_its_last_token_is_known() -> None:
    driver = Driver(make_scheduler(block_size=4))
    driver.add("a", [1, 2, 3], max_tokens=9)
    steps = deque(driver.schedule() for _ in range(2))  # the second one fills the block, with a token nobody knows yet
    driver.add("b", [1, 2, 3, 9, 5], max_tokens=1)
    steps.append(driver.schedule())
    assert steps[-1].scheduled[-1].first_position == 0
    for token_id in (9, 9, 9):
        driver.update(steps.popleft(), {"a": [token_id]})
    driver.add("c", [1, 2, 3, 9, 5], max_tokens=1)
    assert driver.schedule().scheduled[-1].first_position == 4


def test_the_last_block_of_a_request_that_ends_gets_its_name_too() -> None:
    driver = Driver(make_scheduler(block_size=4))
    driver.add("a", [1, 2, 3], max_tokens=3)
    steps = [driver.schedule() for _ in range(3)]
    assert driver.schedule().is_empty
    for step in steps:
        driver.update(step, {"a": [9]})
    driver.add("b", [1, 2, 3, 9, 5], max_tokens=1)
    assert driver.schedule().scheduled[-1].first_position == 4


def test_a_block_may_leave_the_window_before_its_last_token_is_known() -> None:
    driver = Driver(make_scheduler(block_size=1, sliding_window=1))
    driver.add("a", [1, 2, 3], max_tokens=9)
    steps = [driver.schedule() for _ in range(4)]
    outputs = [driver.update(step, {"a": [5]})["a"] for step in steps]
    assert [output.new_token_ids for output in outputs] == [[5]] * 4


class TestDrafts:
    def test_guesses_at_what_is_being_sampled_already_are_dropped(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a", 3)
        first, second = driver.schedule(), driver.schedule()
        driver.update(first, {"a": [5]}, draft_token_ids={"a": [6, 7]})
        third = driver.schedule()
        assert [(share.num_tokens, share.draft_token_ids) for share in third.scheduled] == [(1, ())]
        for step, token_id in ((second, 8), (third, 9)):
            assert driver.update(step, {"a": [token_id]})["a"].new_token_ids == [token_id]

    def test_right_ones_are_taken_and_wrong_ones_computed_again(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", 3)
        driver.update(driver.schedule(), {"a": [5]}, draft_token_ids={"a": [6, 7, 8]})
        step = driver.schedule()
        (share,) = step.scheduled
        assert (share.first_position, share.num_tokens, share.num_samples) == (3, 4, 4)
        assert share.draft_token_ids == [6, 7, 8]
        assert driver.schedule().is_empty, "nobody knows where it goes on"
        assert driver.update(step, {"a": [6, 1]})["a"].new_token_ids == [6, 1]
        (share,) = driver.schedule().scheduled
        assert (share.first_position, share.num_tokens, share.draft_token_ids) == (5, 1, ())

    def test_no_block_is_named_after_a_draft(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", [1, 2, 3], max_tokens=9)
        driver.update(driver.schedule(), {"a": [4]}, draft_token_ids={"a": [5, 6, 7, 8]})
        step = driver.schedule()
        driver.add("b", [1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1)
        assert driver.schedule().scheduled[-1].first_position == 4
        driver.update(step, {"a": [5, 6, 7, 8, 9]})
        driver.add("c", [1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1)
        assert driver.schedule().scheduled[-1].first_position == 8

    def test_no_more_than_there_is_budget_for_or_output_wanted(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8))
        for request_id, max_tokens in (("a", 4), ("b", 50)):
            driver.add(request_id, 3, max_tokens=max_tokens)
        guesses = {"a": [7] * 9, "b": [7] * 9}
        driver.update(driver.schedule(), draft_token_ids=guesses)
        assert [len(share.draft_token_ids) for share in driver.schedule().scheduled] == [2, 4]

    def test_they_are_the_first_to_go_where_blocks_are_short(self) -> None:
        driver = Driver(make_scheduler(num_blocks=4, block_size=4))
        driver.add("a", 7, max_tokens=6)
        driver.add("b", 1, max_tokens=3)
        driver.update(driver.schedule(), draft_token_ids={"a": [7, 7, 7]})
        assert [(share.num_tokens, share.draft_token_ids) for share in driver.schedule().scheduled] == [
            (1, ()),
            (1, ()),
        ]


class SlowRunner(FakeRunner):
    """Notes when results are asked for."""

    def submit(self, scheduler_output: SchedulerOutput) -> "SlowHandle":
        self.log.append(f"submit {len(self.steps)}")
        return SlowHandle(self, len(self.steps), self.execute(scheduler_output))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log: list[str] = []


class SlowHandle:
    def __init__(self, runner: SlowRunner, number: int, output: RunnerOutput) -> None:
        self.runner, self.number, self.output = runner, number, output

    def result(self) -> RunnerOutput:
        self.runner.log.append(f"result {self.number}")
        return self.output


def make_core(max_steps_ahead: int, num_drafts: int = 0) -> tuple[EngineCore, SlowRunner]:
    runner = SlowRunner(20, 4, num_drafts=num_drafts)
    config = EngineCoreConfig(
        kv_cache=small_kv_cache(),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
        max_model_len=100,
        num_blocks=20,
        block_size=4,
        max_steps_ahead=max_steps_ahead,
    )
    return EngineCore(config, runner), runner


@pytest.mark.parametrize("max_steps_ahead", [0, 1, 2])
def test_the_runner_has_as_many_steps_before_it_as_allowed(max_steps_ahead: int) -> None:
    core, runner = make_core(max_steps_ahead)
    core.add_request(make_engine_request("a", max_tokens=4))
    num_steps = 0
    while core.has_unfinished:
        core.step(0.0)
        num_steps += 1
        assert num_steps < 20
    ahead, most = 0, 0
    for entry in runner.log:
        ahead += 1 if entry.startswith("submit") else -1
        most = max(most, ahead)
    assert most == 1 + max_steps_ahead
    results = [entry for entry in runner.log if entry.startswith("result")]
    assert results == [f"result {number}" for number in range(5)], "four tokens, and the news that it is gone"


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("max_steps_ahead", [0, 1, 2])
def test_answers_are_the_naive_loop_s(max_steps_ahead: int, num_drafts: int) -> None:
    core, _ = make_core(max_steps_ahead, num_drafts)
    requests = [make_engine_request(name, range(3 * index + 1), max_tokens=9) for index, name in enumerate("abcdef")]
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        core.add_request(request)
    for _ in range(300):
        for output in core.step(0.0):
            answers[output.request_id].add(output)
        core.check_integrity()
        if not core.has_unfinished:
            break
    assert not core.has_unfinished
    assert answers == {request.request_id: naive_answer(request) for request in requests}


def test_a_core_with_nothing_but_blocked_requests_says_so() -> None:
    core, runner = make_core(1)
    core.add_request(make_engine_request("a", max_tokens=1), blockers=["grammar"])
    assert not core.is_stalled
    assert core.step(0.0) == []
    assert core.is_stalled
    assert core.has_unfinished
    assert runner.log == []
    core.abort_requests(["never seen"])
    assert not core.is_stalled, "something has happened"
    assert core.step(0.0) == []
    assert core.is_stalled
    core.unblock("a", "grammar")
    assert not core.is_stalled
    outputs = [output for _ in range(3) for output in core.step(0.0)]
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH]
