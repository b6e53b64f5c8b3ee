from engine_fakes import make_request

from quire_server.engine.output import BlockCopy
from quire_server.engine.step_builder import StepBuilder


def test_a_step_collects_running_and_new_requests_in_order() -> None:
    step = StepBuilder(token_budget=10)
    running, new = make_request("a"), make_request("b", [1, 2, 3])
    running.num_computed_tokens = 4
    step.add_running(running, 1, [7])
    for request, num_tokens in step.commit_running():
        request.num_computed_tokens += num_tokens
    step.add_new(new, 3, [8])
    assert step.token_budget == 6
    scheduler_output = step.build(["gone"], [BlockCopy(1, 2)])
    assert list(scheduler_output.num_scheduled_tokens.items()) == [("a", 1), ("b", 3)]
    assert scheduler_output.total_num_scheduled_tokens == 4
    assert scheduler_output.running_requests[0].num_computed_tokens == 4, "as it was before the step"
    assert scheduler_output.running_requests[0].new_block_ids == [7]
    assert scheduler_output.new_requests[0].token_ids == [1, 2, 3]
    assert scheduler_output.removed_request_ids == ["gone"]
    assert scheduler_output.block_copies == [BlockCopy(1, 2)]


def test_a_cancelled_request_gives_its_tokens_back() -> None:
    step = StepBuilder(token_budget=10)
    victim, other = make_request("a"), make_request("b")
    step.add_running(victim, 6, ())
    step.cancel_running(victim)
    step.cancel_running(other)
    assert step.token_budget == 10
    assert list(step.commit_running()) == []
    assert step.build((), ()).num_scheduled_tokens == {}
