from collections.abc import Mapping, Sequence

import pytest
from engine_fakes import make_engine_request, make_scheduler, token_logprobs
from quire_server.engine.output import RequestOutput, RunnerOutput, SchedulerOutput, TokenLogprobs
from quire_server.engine.request import FinishReason
from quire_server.engine.scheduler import Scheduler
from quire_server.errors import ContextLengthError, InvalidRequestError


class Driver:
    """Steps a scheduler by hand. A request whose tokens are all computed is given the token 7, or what `tokens` says."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.left: dict[str, int] = {}

    def add(self, request_id: str, prompt: Sequence[int] | int = 5, **kwargs) -> None:
        prompt = [hash((request_id, p)) % 1000 for p in range(prompt)] if isinstance(prompt, int) else prompt
        self.scheduler.add_request(make_engine_request(request_id, prompt, **kwargs))

    def schedule(self, now: float = 0.0) -> SchedulerOutput:
        scheduler_output = self.scheduler.schedule(now)
        for new in scheduler_output.new_requests:
            self.left[new.request_id] = len(new.token_ids) - new.num_computed_tokens
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            self.left[request_id] -= num_tokens
        return scheduler_output

    def update(
        self,
        scheduler_output: SchedulerOutput,
        tokens: Mapping[str, Sequence[int]] = {},  # noqa: B006
        **kwargs: Mapping[str, Sequence[TokenLogprobs]],
    ) -> dict[str, RequestOutput]:
        sampled = {}
        for request_id in scheduler_output.num_scheduled_tokens:
            if self.left[request_id] == 0:
                sampled[request_id] = tokens.get(request_id, [7])
                self.left[request_id] = len(sampled[request_id])
        outputs = self.scheduler.update_from_output(
            scheduler_output, RunnerOutput(sampled_token_ids=sampled, **kwargs)
        )
        self.scheduler.check_integrity()
        return {output.request_id: output for output in outputs}

    def step(self, tokens: Mapping[str, Sequence[int]] = {}) -> tuple[SchedulerOutput, dict[str, RequestOutput]]:  # noqa: B006
        scheduler_output = self.schedule()
        return scheduler_output, self.update(scheduler_output, tokens)

    def scheduled(self, num_steps: int) -> list[dict[str, int]]:
        return [dict(self.step()[0].num_scheduled_tokens) for _ in range(num_steps)]


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
        (new,) = driver.schedule().new_requests
        assert (new.request_id, new.token_ids, new.num_prompt_tokens) == ("a", [1, 2, 3, 4, 5], 5)
        assert (new.num_computed_tokens, len(new.block_ids), new.eos_token_ids) == (0, 2, (3, 9))

    def test_a_running_request_brings_only_what_changed(self) -> None:
        driver = Driver(make_scheduler(block_size=4))
        driver.add("a", 3)
        driver.step()
        steps = [driver.step()[0].running_requests[0] for _ in range(2)]
        assert [step.num_computed_tokens for step in steps] == [3, 4]
        assert [len(step.new_block_ids) for step in steps] == [0, 1]

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
        assert scheduler_output.new_requests[0].num_computed_tokens == 8
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
    def make_full(self, **kwargs) -> Driver:
        """Two requests of two blocks each that have filled a cache of four."""
        driver = Driver(make_scheduler(num_blocks=5, block_size=4, **kwargs))
        driver.add("a", 7, priority=1, arrival_time=1.0, max_tokens=9)
        driver.add("b", 7, priority=0, arrival_time=2.0, max_tokens=9)
        driver.step()
        driver.step()
        return driver

    def test_fcfs_takes_the_last_admitted(self) -> None:
        driver = self.make_full()
        scheduler_output, _ = driver.step()
        assert scheduler_output.num_scheduled_tokens == {"a": 1}
        assert scheduler_output.removed_request_ids == ["b"]
        assert driver.scheduler.stats().num_preemptions == 1

    def test_priority_takes_the_worst_even_if_it_was_already_scheduled(self) -> None:
        driver = self.make_full(policy="priority")
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
        driver = self.make_full()
        driver.step()
        driver.scheduler.abort_requests(["a"])
        scheduler_output, outputs = driver.step()
        (new,) = scheduler_output.new_requests
        assert (new.request_id, len(new.token_ids), new.num_prompt_tokens) == ("b", 9, 7)
        assert outputs["b"].new_token_ids == [7]

    def test_a_preempted_request_finds_its_own_blocks_again(self) -> None:
        driver = self.make_full()
        driver.step()
        driver.scheduler.abort_requests(["a"])
        scheduler_output, outputs = driver.step()
        assert scheduler_output.new_requests[0].num_computed_tokens == 4
        assert outputs["b"].num_cached_tokens == 0, "that was no help to the prompt"

    def test_a_preempted_request_waits_before_those_that_never_ran(self) -> None:
        driver = self.make_full()
        driver.add("c", 1)
        driver.step()
        driver.scheduler.abort_requests(["a"])
        assert [new.request_id for new in driver.step()[0].new_requests][0] == "b"

    def test_nobody_is_admitted_in_a_step_that_preempted(self) -> None:
        driver = self.make_full()
        driver.add("c", 1)
        assert driver.scheduled(1) == [{"a": 1}]

    def test_blocks_of_a_cancelled_chunk_are_not_offered_to_others(self) -> None:
        """Their KV was never computed."""
        driver = Driver(make_scheduler(num_blocks=9, block_size=4, policy="priority", long_prefill_token_threshold=8))
        driver.add("worse", list(range(24)), priority=1, max_tokens=1)
        driver.add("better", 7, priority=0, max_tokens=9)
        assert driver.scheduled(2) == [{"worse": 8, "better": 7}, {"worse": 8, "better": 1}]
        # The third chunk has its two blocks already when "better" needs one, and takes them all.
        assert driver.scheduled(1) == [{"better": 1}]
        driver.scheduler.abort_requests(["worse", "better"])
        driver.add("probe", list(range(24)), max_tokens=1)
        (new,) = driver.step()[0].new_requests
        assert new.num_computed_tokens == 16


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
        driver = Driver(make_scheduler(num_blocks=7, block_size=4, max_num_batched_tokens=12, long_prefill_token_threshold=4))
        driver.add("a", 16, max_tokens=2)
        driver.add("b", 12, max_tokens=2)
        assert driver.scheduled(1) == [{"a": 4}], "4 of 6 blocks are spoken for, and b needs 3"

    def test_running_requests_are_left_some_room_to_grow(self) -> None:
        driver = Driver(make_scheduler(num_blocks=201, block_size=1, max_num_batched_tokens=1000, max_model_len=1000))
        driver.add("a", 100)
        driver.add("b", 99)
        driver.add("c", 2)
        assert driver.scheduled(1) == [{"a": 100}], "99 of 100 free blocks would leave 1, and 2 are kept"


class TestTheDoor:
    @pytest.mark.parametrize(
        ("num_prompt_tokens", "max_tokens", "param"),
        [(90, 11, "max_tokens"), (101, 0, "prompt"), (100, 1, "prompt")],
    )
    def test_more_than_the_context_is_refused_with_the_numbers(self, num_prompt_tokens, max_tokens, param) -> None:
        driver = Driver(make_scheduler(max_model_len=100))
        with pytest.raises(ContextLengthError, match="maximum context length is 100 tokens") as caught:
            driver.add("a", num_prompt_tokens, max_tokens=max_tokens)
        assert f"{num_prompt_tokens} in the prompt, {max_tokens} in the completion" in str(caught.value)
        assert caught.value.param == param
        assert not driver.scheduler.has_unfinished

    @pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(90, 10), (100, 0), (99, 1)])
    def test_all_of_the_context_is_allowed(self, num_prompt_tokens, max_tokens) -> None:
        driver = Driver(make_scheduler(max_model_len=100))
        driver.add("a", num_prompt_tokens, max_tokens=max_tokens)
        assert driver.scheduler.has_unfinished

    def test_more_than_the_cache_is_refused_with_the_numbers(self) -> None:
        driver = Driver(make_scheduler(num_blocks=3, block_size=4))
        driver.add("fits", 6, max_tokens=3)
        with pytest.raises(InvalidRequestError, match=r"holds 8 tokens.* 10 tokens requested \(6 in the prompt"):
            driver.add("a", 6, max_tokens=4)

    def test_an_empty_prompt_is_refused(self) -> None:
        with pytest.raises(InvalidRequestError, match="empty"):
            Driver(make_scheduler()).add("a", [])

    def test_an_id_in_use_is_refused(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a")
        with pytest.raises(InvalidRequestError, match="already in use"):
            driver.add("a")


class TestAbort:
    def test_a_waiting_request_leaves_without_the_runner_hearing_of_it(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a")
        assert driver.scheduler.abort_requests(["a", "unknown", "a"]) == ["a"]
        assert not driver.scheduler.has_unfinished

    def test_a_running_request_frees_its_blocks_at_once(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a")
        driver.step()
        driver.scheduler.abort_requests(["a"])
        driver.scheduler.check_integrity()
        assert driver.scheduler.stats().kv_cache_usage == 0.0
        assert driver.schedule().removed_request_ids == ["a"]

    def test_a_preempted_request_is_removed_from_the_runner_once(self) -> None:
        driver = TestPreemption().make_full()
        driver.step()
        driver.scheduler.abort_requests(["b"])
        assert driver.step()[0].removed_request_ids == []

    def test_tokens_of_a_request_aborted_during_the_step_are_dropped(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a")
        driver.add("b")
        scheduler_output = driver.schedule()
        driver.scheduler.abort_requests(["a"])
        assert driver.update(scheduler_output).keys() == {"b"}

    def test_an_id_used_again_during_the_step_does_not_get_the_old_tokens(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a")
        scheduler_output = driver.schedule()
        driver.scheduler.abort_requests(["a"])
        driver.add("a", [1, 2])
        assert driver.update(scheduler_output) == {}
        scheduler_output, outputs = driver.step()
        assert scheduler_output.removed_request_ids == ["a"]
        assert scheduler_output.new_requests[0].token_ids == [1, 2]
        assert outputs["a"].new_token_ids == [7]


class TestOutputs:
    def test_a_chunk_that_is_not_the_last_says_nothing(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8))
        driver.add("a", 10)
        assert [list(driver.step()[1]) for _ in range(2)] == [[], ["a"]]

    def test_a_stop_token_ends_the_request_and_is_sent(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a", stop_token_ids=(3,))
        output = driver.step({"a": [3]})[1]["a"]
        assert (output.new_token_ids, output.finish_reason, output.stop_reason) == ([3], FinishReason.STOP, 3)

    def test_tokens_after_the_end_are_dropped(self) -> None:
        driver = Driver(make_scheduler())
        driver.add("a", eos_token_ids=(3,), logprobs=0)
        scheduler_output = driver.schedule()
        logprobs = {"a": [token_logprobs(token_id, 0) for token_id in (1, 3, 4)]}
        output = driver.update(scheduler_output, {"a": [1, 3, 4]}, logprobs=logprobs)["a"]
        assert (output.new_token_ids, output.stop_reason) == ([1, 3], None)
        assert [logprob.token_id for logprob in output.logprobs] == [1, 3]

    def test_zero_max_tokens_ends_after_the_prompt_without_a_token(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8))
        driver.add("a", 10, max_tokens=0)
        assert driver.step()[1] == {}
        output = driver.step()[1]["a"]
        assert (output.new_token_ids, output.finish_reason) == ([], FinishReason.LENGTH)

    def test_the_first_output_says_when_the_request_was_first_scheduled(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8))
        driver.add("a", 10)
        outputs = [driver.update(driver.schedule(now)) for now in (5.0, 6.0, 7.0)]
        assert [output.get("a") and output["a"].scheduled_time for output in outputs] == [None, 5.0, None]

    def test_prompt_logprobs_are_sent_chunk_by_chunk(self) -> None:
        driver = Driver(make_scheduler(max_num_batched_tokens=8))
        driver.add("a", 10, prompt_logprobs=0)
        all_logprobs = [token_logprobs(position, position) for position in range(9)]
        first = driver.update(driver.schedule(), prompt_logprobs={"a": all_logprobs[:8]})
        second = driver.update(driver.schedule(), prompt_logprobs={"a": all_logprobs[8:]})
        assert first["a"].prompt_logprobs == all_logprobs[:8]
        assert first["a"].new_token_ids == []
        assert second["a"].prompt_logprobs == all_logprobs[8:]
        assert second["a"].new_token_ids == [7]

    def test_prompt_logprobs_are_not_sent_again_after_a_preemption(self) -> None:
        driver = Driver(make_scheduler(num_blocks=5, block_size=4))
        driver.add("a", 7, max_tokens=3)
        driver.add("b", 7, max_tokens=9, prompt_logprobs=0)
        logprobs = [token_logprobs(position, position) for position in range(6)]
        driver.update(driver.schedule(), prompt_logprobs={"b": logprobs})
        driver.step()
        scheduler_output, outputs = driver.step()
        assert scheduler_output.removed_request_ids == ["b"]
        assert outputs["a"].finish_reason is FinishReason.LENGTH
        scheduler_output = driver.schedule()
        assert scheduler_output.num_scheduled_tokens == {"b": 9}
        output = driver.update(scheduler_output, prompt_logprobs={"b": logprobs})["b"]
        assert (output.prompt_logprobs, output.new_token_ids) == ([], [7])

    @pytest.mark.parametrize("tokens", [{"a": []}, {}], ids=["an empty list", "no entry"])
    def test_a_runner_that_owes_a_token_is_found_out(self, tokens) -> None:
        scheduler = make_scheduler()
        scheduler.add_request(make_engine_request("a"))
        with pytest.raises(RuntimeError, match="sampled 0 tokens for request a"):
            scheduler.update_from_output(scheduler.schedule(0.0), RunnerOutput(sampled_token_ids=tokens))

    def test_a_runner_that_samples_in_the_middle_of_a_prompt_is_found_out(self) -> None:
        scheduler = make_scheduler(max_num_batched_tokens=8)
        scheduler.add_request(make_engine_request("a", range(10)))
        with pytest.raises(RuntimeError, match="8 of 10 tokens are computed"):
            scheduler.update_from_output(scheduler.schedule(0.0), RunnerOutput(sampled_token_ids={"a": [1]}))


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
