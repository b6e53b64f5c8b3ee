from engine_fakes import make_request

from quire_server.engine.step import BlockCopy, ScheduledRequest
from quire_server.engine.step_builder import StepBuilder


def test_a_step_collects_running_and_new_requests_in_order() -> None:
    step = StepBuilder(token_budget=10)
    step.add(ScheduledRequest(request_id="a", epoch=1, first_position=4, num_tokens=1, new_block_ids=[7]))
    step.introduce(make_request("b", [1, 2, 3]))
    step.add(ScheduledRequest(request_id="b", epoch=2, first_position=0, num_tokens=3, new_block_ids=[8]))
    assert step.token_budget == 6
    scheduler_output = step.build(["gone"], [BlockCopy(1, 2)])
    assert list(scheduler_output.num_scheduled_tokens.items()) == [("a", 1), ("b", 3)]
    assert scheduler_output.total_num_scheduled_tokens == 4
    assert [new.token_ids for new in scheduler_output.new_requests] == [[1, 2, 3]]
    assert scheduler_output.removed_request_ids == ["gone"]
    assert scheduler_output.block_copies == [BlockCopy(1, 2)]
    assert not scheduler_output.is_empty


def test_a_step_with_nothing_to_tell_is_empty() -> None:
    assert StepBuilder(token_budget=10).build((), ()).is_empty
    assert not StepBuilder(token_budget=10).build(["gone"], ()).is_empty
    assert not StepBuilder(token_budget=10).build((), [BlockCopy(1, 2)]).is_empty
