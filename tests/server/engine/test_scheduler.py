import pytest
from engine_fakes import SchedulerDriver as Driver
from engine_fakes import make_full, make_manager, make_request, make_scheduler

from quire_server.engine.scheduler import Scheduler
from quire_server.engine.step import RunnerOutput
from quire_server.shared.config import SchedulerConfig


class TestBudget:
    def test_prompts_go_first_whole_then_one_token_at_a_time(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a", 5)
        driver.add("b", 3)
        assert driver.scheduled(2) == [{"a": 5, "b": 3}, {"a": 1, "b": 1}]

    def test_a_long_prompt_is_chunked_to_the_budget(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8))
        driver.add("a", 20)
        assert driver.scheduled(4) == [{"a": 8}, {"a": 8}, {"a": 4}, {"a": 1}]

    def test_running_requests_are_served_before_new_prompts(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8))
        driver.add("a", 4)
        driver.step()
        driver.add("b", 20)
        assert driver.scheduled(3) == [{"a": 1, "b": 7}, {"a": 1, "b": 7}, {"a": 1, "b": 6}]

    def test_the_threshold_leaves_budget_to_shorter_prompts(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=16, long_prefill_token_threshold=6))
        driver.add("a", 14)
        driver.add("b", 4)
        assert driver.scheduled(3) == [{"a": 6, "b": 4}, {"a": 6, "b": 1}, {"a": 2, "b": 1}]

    def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=16, enable_chunked_prefill=False))
        driver.add("a", 10)
        driver.add("b", 10)
        driver.add("c", 2)
        assert driver.scheduled(2) == [{"a": 10}, {"a": 1, "b": 10, "c": 2}]

    def test_without_chunked_prefill_a_prompt_longer_than_any_step_goes_in_pieces(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8, enable_chunked_prefill=False))
        driver.add("a", 10)
        assert driver.scheduled(3) == [{"a": 8}, {"a": 2}, {"a": 1}]

    def test_no_more_than_max_num_seqs_run(self) -> None:
        driver = Driver(make_scheduler(max_num_seqs=2))
        for request_id in "abc":
            driver.add(request_id, 3, max_tokens=2)
        assert driver.scheduled(3) == [{"a": 3, "b": 3}, {"a": 1, "b": 1}, {"c": 3}]


class TestSchedulerOutput:
    def test_a_new_request_brings_all_that_the_runner_needs(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", [1, 2, 3, 4, 5], eos_token_ids=(9, 3))
        scheduler_output = driver.schedule()
        (new,), (share,) = scheduler_output.new_requests, scheduler_output.scheduled
        assert (new.request_id, new.token_ids, new.num_prompt_tokens) == ("a", [1, 2, 3, 4, 5], 5)
        assert (share.first_position, len(share.new_block_ids), new.eos_token_ids) == (0, 2, (3, 9))

    def test_a_running_request_brings_only_what_changed(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", 3)
        driver.step()
        steps = [driver.step()[0] for _ in range(2)]
        assert [step.new_requests for step in steps] == [[], []]
        shares = [step.scheduled[0] for step in steps]
        assert [share.first_position for share in shares] == [3, 4]
        assert [len(share.new_block_ids) for share in shares] == [0, 1]

    def test_token_ids_given_to_the_runner_are_its_own(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a", [1, 2, 3])
        scheduler_output, _ = driver.step()
        assert scheduler_output.new_requests[0].token_ids == [1, 2, 3]

    def test_the_runner_hears_of_an_end_in_the_next_step(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a", 3, max_tokens=1)
        driver.step()
        assert driver.scheduler.has_unfinished
        scheduler_output, _ = driver.step()
        assert scheduler_output.removed_request_ids == ["a"]
        assert not driver.scheduler.has_unfinished


class TestPrefixCache:
    def test_a_second_prompt_computes_only_what_differs(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", list(range(10)))
        driver.step()
        driver.add("b", [*range(8), 99, 98])
        scheduler_output, outputs = driver.step()
        assert scheduler_output.num_scheduled_tokens == {"a": 1, "b": 2}
        assert scheduler_output.scheduled[1].first_position == 8
        assert outputs["b"].num_cached_tokens == 8

    def test_prompts_that_come_together_share_within_the_step(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", list(range(10)))
        driver.add("b", list(range(10)))
        assert driver.scheduled(1) == [{"a": 10, "b": 2}]

    def test_cached_tokens_are_reported_once(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", list(range(10)), max_tokens=1)
        driver.step()
        driver.add("b", list(range(10)))
        assert [driver.step()[1]["b"].num_cached_tokens for _ in range(2)] == [8, 0]

    def test_prompt_logprobs_need_every_position_computed(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", list(range(10)))
        driver.step()
        driver.add("b", list(range(10)), prompt_logprobs=0)
        assert driver.scheduled(1) == [{"a": 1, "b": 10}]

    def test_hits_are_counted_in_tokens(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", list(range(10)))
        driver.step()
        driver.add("b", list(range(10)))
        driver.step()
        stats = driver.scheduler.stats()
        assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (20, 8)

    def test_after_a_reset_nothing_is_hit(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", list(range(10)))
        driver.step()
        driver.scheduler.reset_prefix_cache()
        driver.add("b", list(range(10)))
        assert driver.scheduled(1) == [{"a": 1, "b": 10}]


class TestPreemption:
    def test_fcfs_takes_the_last_admitted(self) -> None:
        driver = make_full()
        scheduler_output, _ = driver.step()
        assert scheduler_output.num_scheduled_tokens == {"a": 1}
        assert scheduler_output.removed_request_ids == ["b"]
        assert driver.scheduler.stats().num_preemptions == 1

    def test_priority_takes_the_worst_even_if_it_was_already_scheduled(self) -> None:
        driver = make_full(policy="priority")
        # b is the better one and runs before a: it takes a's blocks.
        scheduler_output, _ = driver.step()
        assert scheduler_output.num_scheduled_tokens == {"b": 1}
        assert scheduler_output.removed_request_ids == ["a"]

    def test_a_victim_that_was_already_scheduled_gives_its_budget_back(self) -> None:
        driver = Driver(make_scheduler(num_blocks=6, block_size=4, policy="priority", max_num_batched_tokens=64))
        driver.add("worse", 4, priority=1, max_tokens=9)
        driver.step()
        driver.add("better", 11, priority=0, max_tokens=9)
        driver.step()  # 2 + 3 blocks
        driver.step()
        scheduler_output, _ = driver.step()
        assert scheduler_output.num_scheduled_tokens == {"better": 1}
        assert scheduler_output.total_num_scheduled_tokens == 1

    def test_among_equals_priority_takes_the_last_admitted(self) -> None:
        driver = Driver(make_scheduler(num_blocks=5, block_size=4, policy="priority"))
        for request_id in "ab":
            driver.add(request_id, 7, max_tokens=9)
        driver.step()
        driver.step()
        assert driver.step()[0].removed_request_ids == ["b"]

    def test_a_preempted_request_comes_back_as_new_with_all_its_tokens(self) -> None:
        driver = make_full()
        driver.step()
        driver.scheduler.abort_requests(["a"])
        scheduler_output, outputs = driver.step()
        (new,) = scheduler_output.new_requests
        assert (new.request_id, len(new.token_ids), new.num_prompt_tokens) == ("b", 9, 7)
        assert outputs["b"].new_token_ids == [7]

    def test_a_preempted_request_finds_its_own_blocks_again(self) -> None:
        driver = make_full()
        driver.step()
        driver.scheduler.abort_requests(["a"])
        scheduler_output, outputs = driver.step()
        assert scheduler_output.scheduled[0].first_position == 4
        assert outputs["b"].num_cached_tokens == 0, "that was no help to the prompt"

    def test_a_preempted_request_waits_before_those_that_never_ran(self) -> None:
        driver = make_full()
        driver.add("c", 1)
        driver.step()
        driver.scheduler.abort_requests(["a"])
        assert driver.step()[0].new_requests[0].request_id == "b"

    def test_who_gives_way_waits_for_another_step(self) -> None:
        driver = make_full()
        driver.add("c", 1)
        assert driver.scheduled(1) == [{"a": 1}]

    def test_of_equals_the_one_that_arrived_last_gives_way_whoever_was_admitted_first(self) -> None:
        driver = Driver(make_scheduler(num_blocks=5, block_size=4, policy="priority"))
        driver.add("late", 7, arrival_time=2.0, max_tokens=9)
        driver.step()
        driver.add("early", 7, arrival_time=1.0, max_tokens=9)
        driver.step()
        scheduler_output, _ = driver.step()
        assert scheduler_output.removed_request_ids == ["late"]
        assert scheduler_output.num_scheduled_tokens == {"early": 1}

    def test_a_request_preempted_before_its_first_token_tells_of_its_first_start(self) -> None:
        driver = Driver(make_scheduler(num_blocks=9, block_size=4, policy="priority", long_prefill_token_threshold=8))
        driver.add("worse", 24, priority=1, max_tokens=1)
        driver.add("better", 7, priority=0, max_tokens=4)
        driver.update(driver.schedule(now=1.0))
        while not driver.scheduler.stats().num_preemptions:
            driver.step()
        queries = driver.scheduler.stats().prefix_cache_queries
        while "worse" not in (outputs := driver.step()[1]):
            pass
        assert (outputs["worse"].scheduled_time, outputs["worse"].num_cached_tokens) == (1.0, 0)
        assert driver.scheduler.stats().prefix_cache_queries == queries

    def test_blocks_of_a_cancelled_chunk_are_not_offered_to_others(self) -> None:
        """Their KV was never computed."""
        driver = Driver(make_scheduler(num_blocks=9, block_size=4, policy="priority", long_prefill_token_threshold=8))
        driver.add("worse", list(range(24)), priority=1, max_tokens=1)
        driver.add("better", 7, priority=0, max_tokens=9)
        assert driver.scheduled(2) == [{"better": 7, "worse": 8}, {"better": 1, "worse": 8}]
        # The third chunk has its two blocks already when "better" needs one, and takes them all.
        assert driver.scheduled(1) == [{"better": 1}]
        driver.scheduler.abort_requests(["worse", "better"])
        driver.add("probe", list(range(24)), max_tokens=1)
        (share,) = driver.step()[0].scheduled
        assert share.first_position == 16


class TestAdmission:
    def test_a_prompt_that_does_not_fit_whole_is_not_begun(self) -> None:
        driver = Driver(make_scheduler(num_blocks=7, block_size=4, max_num_batched_tokens=8))
        driver.add("a", 12, max_tokens=2)
        driver.add("b", 16, max_tokens=2)
        steps = driver.scheduled(3)
        assert steps == [{"a": 8}, {"a": 4}, {"a": 1}]
        assert driver.scheduled(1) == [{"b": 8}]
        assert driver.scheduler.stats().num_preemptions == 0

    def test_room_that_a_chunked_prompt_still_needs_is_not_given_away(self) -> None:
        driver = Driver(
            make_scheduler(num_blocks=7, block_size=4, max_num_batched_tokens=12, long_prefill_token_threshold=4)
        )
        driver.add("a", 16, max_tokens=2)
        driver.add("b", 12, max_tokens=2)
        assert driver.scheduled(1) == [{"a": 4}], "4 of 6 blocks are spoken for, and b needs 3"

    def test_running_requests_are_left_some_room_to_grow(self) -> None:
        driver = Driver(make_scheduler(num_blocks=201, block_size=1, max_num_batched_tokens=1000, max_model_len=1000))
        driver.add("a", 100)
        driver.add("b", 99)
        driver.add("c", 2)
        assert driver.scheduled(1) == [{"a": 100}], "99 of 100 free blocks would leave 1, and 2 are kept"

    def test_a_request_that_needs_the_whole_cache_runs_when_it_is_alone(self) -> None:
        driver = Driver(make_scheduler(num_blocks=201, block_size=1, max_num_batched_tokens=1000, max_model_len=1000))
        driver.add("a", 200, max_tokens=1)
        assert driver.scheduled(1) == [{"a": 200}]


def test_block_copies_go_with_the_step_and_hold_their_blocks_until_it_has_run() -> None:
    manager = make_manager(num_blocks=11, block_size=4)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64), manager, 100)
    parent, child = make_request("a", range(6)), make_request("b", range(7))
    manager.allocate(parent, 6)
    parent.num_computed_tokens = child.num_computed_tokens = 6
    manager.fork(parent, child)
    manager.allocate(child, 1)
    scheduler_output = scheduler.schedule(0.0)
    assert len(scheduler_output.block_copies) == 1
    manager.free(parent)
    manager.free(child)
    assert manager.usage == pytest.approx(2 / 10)
    scheduler.update_from_output(scheduler_output, RunnerOutput())
    assert manager.usage == 0.0


def test_stats_tell_what_is_going_on() -> None:
    driver = Driver(make_scheduler(num_blocks=11, block_size=4, max_num_seqs=1))
    driver.add("a", 5)
    driver.add("b", 5)
    driver.step()
    stats = driver.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps, stats.step_num_tokens) == (1, 1, 1, 5)
    assert stats.kv_cache_usage == pytest.approx(0.2)


def test_a_step_without_requests_is_no_step() -> None:
    driver = Driver(make_scheduler())
    assert driver.step()[0].total_num_scheduled_tokens == 0
    assert driver.scheduler.stats().num_steps == 0
