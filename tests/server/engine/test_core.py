from typing import Any

import pytest
from engine_fakes import Answer, FakeRunner, make_engine_request, naive_answer
from kv_storage import small_kv_cache

from quire_server.engine.core import EngineCore, EngineCoreConfig
from quire_server.engine.output import EngineCoreOutput
from quire_server.engine.request import FinishReason
from quire_server.engine.step import RunnerOutput, SchedulerOutput
from quire_server.shared.config import SchedulerConfig


def make_core(num_blocks: int = 20, block_size: int = 4, **scheduler: object) -> tuple[EngineCore, FakeRunner]:
    runner = FakeRunner(num_blocks, block_size)
    config = EngineCoreConfig(
        kv_cache=small_kv_cache(),
        scheduler=SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, **scheduler}),
        max_model_len=100,
        num_blocks=num_blocks,
        block_size=block_size,
    )
    return EngineCore(config, runner), runner


def run_to_the_end(core: EngineCore, max_steps: int = 200) -> list[EngineCoreOutput]:
    outputs = []
    for _ in range(max_steps):
        if not core.has_unfinished:
            break
        outputs += core.step(0.0)
        core.check_integrity()
    assert not core.has_unfinished
    return outputs


def test_a_request_runs_to_its_end() -> None:
    core, runner = make_core()
    request = make_engine_request("a", max_tokens=6)
    core.add_request(request)
    answer = Answer()
    for output in run_to_the_end(core):
        answer.add(output)
    assert answer == naive_answer(request)
    assert runner.requests == {}, "the runner has heard of the end"


def test_an_idle_engine_does_not_call_the_runner() -> None:
    core, runner = make_core()
    assert core.step(0.0) == []
    assert not core.has_unfinished
    assert runner.steps == []


def test_the_last_removal_is_delivered_by_a_step_of_its_own() -> None:
    core, runner = make_core()
    core.add_request(make_engine_request("a", max_tokens=1))
    assert core.step(0.0)[0].finish_reason is FinishReason.LENGTH
    assert core.has_unfinished
    assert core.step(0.0) == []
    assert runner.steps[-1] == SchedulerOutput(
        scheduled=[], new_requests=[], removed_request_ids=["a"], block_copies=[]
    )


def test_an_impossible_request_ends_with_an_error_and_the_others_go_on() -> None:
    core, _ = make_core()
    core.add_request(make_engine_request("long", range(90), max_tokens=20))
    core.add_request(make_engine_request("a", max_tokens=1))
    assert core.has_unfinished
    long, a = core.step(0.0)
    assert (long.request_id, long.finish_reason) == ("long", FinishReason.ERROR)
    assert long.error is not None
    assert "maximum context length is 100 tokens" in long.error.message
    assert (a.request_id, a.finish_reason) == ("a", FinishReason.LENGTH)


def test_an_aborted_request_hears_of_its_end_once() -> None:
    core, _ = make_core()
    core.add_request(make_engine_request("waiting"))
    core.abort_requests(["waiting", "never seen"])
    assert run_to_the_end(core) == [EngineCoreOutput(request_id="waiting", finish_reason=FinishReason.ABORT)]
    core.abort_requests(["waiting"])
    assert not core.has_unfinished


def test_a_running_request_is_aborted_between_steps() -> None:
    core, runner = make_core()
    core.add_request(make_engine_request("a", max_tokens=50))
    core.step(0.0)
    core.abort_requests(["a"])
    (output,) = run_to_the_end(core)
    assert output.finish_reason is FinishReason.ABORT
    assert runner.requests == {}
    assert core.stats().kv_cache_usage == 0.0


class FailingRunner:
    """Fails at once, or (as a device does) when somebody waits for the step."""

    is_asynchronous = False

    def __init__(self, is_late: bool) -> None:
        self.is_late = is_late

    def submit(self, scheduler_output: SchedulerOutput) -> "FailingRunner":
        return self if self.is_late else self.fail()

    def result(self) -> RunnerOutput:
        return self.fail()

    def fail(self) -> Any:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("is_late", [False, True])
def test_a_failure_of_the_runner_is_passed_on(is_late: bool) -> None:
    core, _ = make_core()
    core._runner = FailingRunner(is_late)
    for request_id in "ab":
        core.add_request(make_engine_request(request_id))
    core.add_request(make_engine_request("refused", range(200)))
    with pytest.raises(RuntimeError, match="out of memory"):
        core.step(0.0)
    assert core._scheduler.request_ids == ["a", "b"], "what never ended has not been forgotten"


def test_after_a_reset_requests_rest_on_nothing_computed_before() -> None:
    core, runner = make_core()
    core.add_request(make_engine_request("old", range(10), max_tokens=20))
    for _ in range(3):
        core.step(0.0)
    runner.weights = 1
    core.reset_prefix_cache()
    for _ in range(8):
        core.step(0.0)
    new = make_engine_request("new", range(10), max_tokens=20)
    core.add_request(new)
    answer = Answer()
    for output in run_to_the_end(core):
        if output.request_id == "new":
            answer.add(output)
    assert answer == naive_answer(new, weights=1)


def test_stats_are_those_of_the_scheduler() -> None:
    core, _ = make_core()
    core.add_request(make_engine_request("a"))
    assert core.stats().num_waiting == 1
    core.step(0.0)
    assert (core.stats().num_running, core.stats().num_steps) == (1, 1)
