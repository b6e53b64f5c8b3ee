"""A request's way through the scheduler: refused at the door, aborted, answered."""

import pytest
from engine_fakes import SchedulerDriver as Driver
from engine_fakes import make_engine_request, make_full, make_scheduler, token_logprobs

from quire_server.engine.request import FinishReason
from quire_server.engine.step import RunnerOutput
from quire_server.shared.errors import ContextLengthError, InvalidRequestError


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
        driver = make_full()
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
        driver.update(driver.schedule(), {"a": [5]}, draft_token_ids={"a": [1, 3]})
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
        with pytest.raises(
            RuntimeError, match="sampled 1 tokens for request a, of which at most 0 were asked for after 8 tokens"
        ):
            scheduler.update_from_output(scheduler.schedule(0.0), RunnerOutput(sampled_token_ids={"a": [1]}))
