"""Whom the priority policy gives budget, seats and blocks; and who stands aside until it can run."""

from engine_fakes import SchedulerDriver as Driver
from engine_fakes import make_scheduler


class TestPriority:
    def test_a_long_prompt_does_not_keep_its_betters_waiting(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8, policy="priority"))
        driver.add("long", 100, priority=1)
        assert driver.scheduled(1) == [{"long": 8}]
        driver.add("better", 3, priority=0, max_tokens=3)
        driver.add("equal", 3, priority=1)
        assert driver.scheduled(4) == [
            {"better": 3, "long": 5},
            {"better": 1, "long": 7},
            {"better": 1, "long": 7},
            {"long": 8},
        ]

    def test_the_budget_goes_to_the_best_of_the_running_first(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8, policy="priority"))
        driver.add("worse", 12, priority=2)
        driver.step()
        driver.add("best", 12, priority=0)
        driver.add("middle", 12, priority=1)
        assert driver.scheduled(3) == [{"best": 8}, {"best": 4, "middle": 4}, {"best": 1, "middle": 7}]

    def test_a_better_one_takes_the_blocks_of_the_worst(self) -> None:
        driver = Driver(make_scheduler(num_blocks=9, block_size=4, policy="priority"))
        for request_id, priority in (("middle", 1), ("worst", 2)):
            driver.add(request_id, 12, priority=priority, max_tokens=4)
        driver.step()
        driver.add("best", 12, priority=0, max_tokens=2)
        scheduler_output, _ = driver.step()
        assert scheduler_output.num_scheduled_tokens == {"best": 12, "middle": 1}
        assert scheduler_output.removed_request_ids == ["worst"]

    def test_a_better_one_takes_the_seat_of_the_worst(self) -> None:
        driver = Driver(make_scheduler(max_num_seqs=2, policy="priority"))
        for request_id, priority in (("worst", 2), ("middle", 1)):
            driver.add(request_id, 5, priority=priority)
        driver.step()
        driver.add("best", 5, priority=0)
        assert driver.scheduled(1) == [{"best": 5, "middle": 1}]

    def test_nobody_gives_way_in_vain(self) -> None:
        driver = Driver(make_scheduler(num_blocks=11, block_size=4, policy="priority"))
        driver.add("best", 24, priority=0, max_tokens=8)
        driver.add("worst", 4, priority=2, max_tokens=2)
        driver.step()
        driver.add("middle", 20, priority=1, max_tokens=4)
        assert driver.scheduled(1) == [{"best": 1, "worst": 1}]
        assert driver.scheduler.stats().num_preemptions == 0

    def test_blocks_that_the_better_ones_share_count_once(self) -> None:
        """A system prompt that eight requests share, and the newcomer too, is there once."""
        driver = Driver(make_scheduler(num_blocks=36, block_size=4, max_num_seqs=16, policy="priority"))
        system = list(range(40))
        for index in range(8):
            driver.add(f"best {index}", [*system, 100 + index], priority=0, max_tokens=4)
            driver.step()
        driver.add("worst", 40, priority=2, max_tokens=8)
        driver.step()
        driver.add("middle", [*system, 200, 201], priority=1, max_tokens=2)
        driver.step()
        assert "middle" in {request.request_id for request in driver.scheduler._running}

    def test_nobody_gives_way_in_vain_to_the_share_that_is_kept_free(self) -> None:
        """In a cache of 300 blocks three stay free for those that run."""
        driver = Driver(make_scheduler(num_blocks=301, block_size=4, max_num_batched_tokens=2000, policy="priority"))
        driver.add("best", 400, priority=0, max_tokens=8)
        driver.add("worst", 40, priority=2, max_tokens=2)
        driver.step()
        driver.add("middle", 4 * 198, priority=1, max_tokens=4)
        assert driver.scheduled(1) == [{"best": 1, "worst": 1}]
        assert driver.scheduler.stats().num_preemptions == 0

    def test_nobody_gives_way_in_vain_to_what_a_better_one_still_needs(self) -> None:
        """The best has 8 of its 40 tokens; the middle one would fit beside these, but not beside all."""
        limits = {"max_num_batched_tokens": 32, "long_prefill_token_threshold": 8}
        driver = Driver(make_scheduler(num_blocks=15, block_size=4, policy="priority", **limits))
        driver.add("best", 40, priority=0, max_tokens=4)
        driver.add("worst", 8, priority=2, max_tokens=4)
        driver.step()
        driver.add("middle", 20, priority=1, max_tokens=4)
        for _ in range(3):
            driver.step()
        assert driver.scheduler.stats().num_preemptions == 0

    def test_who_ends_with_the_steps_in_flight_is_not_preempted(self) -> None:
        driver = Driver(make_scheduler(max_num_seqs=1, policy="priority"))
        driver.add("worst", 40, priority=1, max_tokens=1)
        last = driver.schedule()
        driver.add("best", 5, priority=0)
        assert driver.schedule().is_empty
        assert driver.update(last, {"worst": [3]})["worst"].new_token_ids == [3]
        assert driver.scheduled(1) == [{"best": 5}]
        assert driver.scheduler.stats().num_preemptions == 0

    def test_nobody_gives_way_in_vain_while_another_ends(self) -> None:
        driver = Driver(make_scheduler(num_blocks=9, block_size=4, policy="priority"))
        driver.add("ending", 16, priority=1, max_tokens=1)
        driver.add("worst", 7, priority=2, max_tokens=9)
        last = driver.schedule()
        driver.add("best", 20, priority=0, max_tokens=1)
        assert driver.schedule().num_scheduled_tokens == {"worst": 1}
        driver.update(last)
        assert driver.schedule().num_scheduled_tokens["best"] == 20

    def test_nobody_gives_way_for_a_prompt_that_needs_a_step_with_more_budget(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8, policy="priority", enable_chunked_prefill=False))
        driver.add("best", 7, priority=0)
        driver.step()
        driver.add("worst", 2, priority=2)
        driver.step()
        driver.add("middle", 8, priority=1)
        assert driver.scheduled(1) == [{"best": 1, "worst": 1}]
        assert driver.scheduler.stats().num_preemptions == 0

    def test_fcfs_knows_no_priority(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8))
        driver.add("long", 20, priority=1)
        driver.step()
        driver.add("better", 3, priority=0)
        assert driver.scheduled(2) == [{"long": 8}, {"long": 4, "better": 3}]


class TestBlocked:
    def test_nobody_waits_for_a_blocked_request(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a", 3, blockers=["grammar", "adapter"])
        driver.add("b", 3)
        assert driver.scheduled(1) == [{"b": 3}]
        driver.scheduler.unblock("a", "grammar")
        assert driver.scheduled(1) == [{"b": 1}]
        driver.scheduler.unblock("a", "adapter")
        assert driver.scheduled(1) == [{"b": 1, "a": 3}]

    def test_who_was_blocked_takes_the_place_that_it_had(self) -> None:
        driver = Driver(make_scheduler(max_num_seqs=1))
        driver.add("running", 3, max_tokens=2)
        driver.add("a", 3, max_tokens=1, blockers=["kv"])
        driver.step()
        driver.add("b", 3)
        driver.scheduler.unblock("a", "kv")
        assert driver.scheduled(3) == [{"running": 1}, {"a": 3}, {"b": 3}]

    def test_a_blocked_request_counts_as_waiting_and_can_be_aborted(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a", 3, blockers=["grammar"])
        assert driver.scheduler.stats().num_waiting == 1
        assert driver.schedule().is_empty
        assert driver.scheduler.abort_requests(["a"]) == ["a"]
        driver.scheduler.unblock("a", "grammar")
        assert not driver.scheduler.has_unfinished
