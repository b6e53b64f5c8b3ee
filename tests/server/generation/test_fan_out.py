"""Prompts times answers go to the engine together, come back as numbered choices, and end together."""

import asyncio

import pytest

from quire_server.engine.output import TokenLogprobs
from quire_server.engine.request import FinishReason
from quire_server.generation.fan_out import Generation
from quire_server.generation.request import GenerationRequest, Prompt
from quire_server.shared.errors import EngineDeadError, InvalidRequestError, QueueFullError, QuireError
from quire_server.shared.sampling_params import SamplingParams

pytestmark = pytest.mark.anyio

LENGTH = FinishReason.LENGTH


async def test_each_choice_is_an_engine_request_in_order(world):
    request = world.ask("ab", "c", n=2, temperature=0.5, stop=("x",), priority=-3, cache_salt="s")
    assert request.choice_to_prompt == [0, 0, 1, 1]
    generation = await Generation.start(world.frontend, request)
    sent = world.engine.requests
    assert [each.prompt_token_ids for each in sent] == [[97, 98], [97, 98], [99], [99]]
    assert len({each.request_id for each in sent}) == 4
    assert all(each.request_id.startswith("mine-") for each in sent)
    assert {(each.priority, each.cache_salt) for each in sent} == {(-3, "s")}
    assert {(each.sampling_params.temperature, each.sampling_params.stop) for each in sent} == {(0.5, ("x",))}
    assert {each.eos_token_ids for each in sent} == {world.frontend.tokenizer.eos_token_ids}
    assert len({each.arrival_time for each in sent}) == 1
    await generation.aclose()


async def test_prompts_may_want_different_numbers_of_answers(world):
    prompts = [
        Prompt(token_ids=[number], sampling_params=SamplingParams(n=n, max_tokens=9))
        for number, n in [(1, 1), (2, 3), (3, 2)]
    ]
    request = GenerationRequest(request_id="mine", prompts=prompts)
    assert request.choice_to_prompt == [0, 1, 1, 1, 2, 2]
    generation = await Generation.start(world.frontend, request)
    assert [each.prompt_token_ids for each in world.engine.requests] == [[1], [2], [2], [2], [3], [3]]
    for number, cached in enumerate([1, 10, 20, 30, 100, 200]):
        world.engine.emit(number, "x", finish_reason=LENGTH, num_cached_tokens=cached)
    assert [answer.text for answer in await generation.collect()] == ["x"] * 6
    assert generation.count_tokens().num_cached_tokens == 1 + 10 + 100


async def test_a_request_without_prompts_is_none():
    with pytest.raises(InvalidRequestError):
        GenerationRequest(request_id="mine", prompts=[])


async def test_a_client_may_use_its_id_twice(world):
    for _ in range(2):
        await Generation.start(world.frontend, world.ask("a"))
    first, second = world.engine.requests
    assert first.request_id != second.request_id


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (None, [None, None, None]),
        (7, [7, 8, 9]),
        (-1, [-1, 0, 1]),
        (9223372036854775806, [9223372036854775806, 9223372036854775807, -9223372036854775808]),
    ],
)
async def test_seeds_count_up_from_the_first_answer_of_each_prompt(world, seed, expected):
    await Generation.start(world.frontend, world.ask("a", "b", n=3, seed=seed))
    assert [each.sampling_params.seed for each in world.engine.requests] == expected * 2


async def test_deltas_of_each_choice_come_in_its_order_and_choices_do_not_wait_for_one_another(world):
    generation = await Generation.start(world.frontend, world.ask("a", "b", n=2))
    seen: list[tuple[int, str]] = []
    deltas = generation.deltas()
    for number, text, finish in [(2, "p", None), (0, "x", None), (2, "q", LENGTH), (0, "y", None), (3, "z", LENGTH)]:
        world.engine.emit(number, text, finish_reason=finish)
        index, delta = await anext(deltas)
        seen.append((index, delta.text))
    assert seen == [(2, "p"), (0, "x"), (2, "q"), (0, "y"), (3, "z")]
    for number in (0, 1):
        world.engine.emit(number, "!", finish_reason=LENGTH)
    rest = [(index, delta.text, delta.finish_reason) async for index, delta in deltas]
    assert rest == [(0, "!", LENGTH), (1, "!", LENGTH)]
    assert world.engine.aborted == []


async def test_whole_answers_are_all_that_their_deltas_brought(world):
    generation = await Generation.start(world.frontend, world.ask("ab", n=2, logprobs=0, prompt_logprobs=0))
    encode = world.frontend.tokenizer.encode

    def logprobs(text: str) -> list[TokenLogprobs]:
        return [TokenLogprobs(token_id, -1.0, 1, []) for token_id in encode(text)]

    async def play() -> None:
        world.engine.emit(0, prompt_logprobs=logprobs("b"))
        for number, text in [(0, "h"), (1, "x"), (0, "i")]:
            world.engine.emit(number, text, logprobs=logprobs(text))
            await asyncio.sleep(0)
        world.engine.emit(0, finish_reason=LENGTH)
        world.engine.emit(1, "!", logprobs=logprobs("!"), finish_reason=FinishReason.STOP, stop_reason=7)

    answers, _ = await asyncio.gather(generation.collect(), play())
    first, second = answers
    assert (first.text, first.token_ids, first.finish_reason, first.stop_reason) == ("hi", encode("hi"), LENGTH, None)
    assert [position.chosen.token for position in first.logprobs] == ["h", "i"]
    assert [position.chosen.token for position in first.prompt_logprobs] == ["b"]
    assert (second.text, second.token_ids, second.finish_reason, second.stop_reason) == ("x", encode("x!"), "stop", 7)
    assert second.prompt_logprobs == []


async def test_tokens_are_counted_as_they_come_and_a_prompt_once(world):
    generation = await Generation.start(world.frontend, world.ask("abc", "d", n=2))

    def counts() -> tuple[int, int, int]:
        counted = generation.count_tokens()
        return counted.num_prompt_tokens, counted.num_cached_tokens, counted.num_output_tokens

    assert counts() == (4, 0, 0)
    deltas = generation.deltas()
    for number, text, cached, expected in [
        (0, "xyz", 2, (4, 2, 3)),
        (1, "x", 3, (4, 2, 4)),  # the same prompt: its first answer says what was cached
        (3, "xx", 1, (4, 2, 6)),
        (2, "x", 1, (4, 3, 7)),
        (0, "x", 0, (4, 3, 8)),
    ]:
        world.engine.emit(number, text, num_cached_tokens=cached)
        await anext(deltas)
        assert counts() == expected
    await generation.aclose()


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_aborts_whatever_still_runs_once(world, n):
    generation = await Generation.start(world.frontend, world.ask("a", "b", n=n))
    world.engine.emit(0, "x", finish_reason=LENGTH)
    deltas = generation.deltas()
    assert (await anext(deltas))[0] == 0
    await deltas.aclose()
    for _ in range(2):
        await generation.aclose()
    assert sorted(world.engine.aborted) == list(range(1, 2 * n))


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_reader_aborts_everything(world, turn, n):
    generation = await Generation.start(world.frontend, world.ask("a", n=n))
    reader = asyncio.ensure_future(generation.collect())
    await turn()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert sorted(world.engine.aborted) == list(range(n))


@pytest.mark.parametrize("error", [QueueFullError("Full.", retry_after_s=3.0), AssertionError("a bug")])
async def test_one_refused_request_ends_the_others(world, error):
    world.engine.refusal = (2, error)
    with pytest.raises(type(error)) as raised:
        await Generation.start(world.frontend, world.ask("a", "b", n=2))
    assert raised.value is error
    assert sorted(world.engine.aborted) == [0, 1]


async def test_more_than_the_queue_can_ever_hold_is_refused_before_anything_is_sent(build_world):
    world = build_world(max_num_seqs=2, max_num_queued_reqs=3)
    with pytest.raises(InvalidRequestError, match="at most 5, got 6") as raised:
        await Generation.start(world.frontend, world.ask("a", "b", n=3))
    assert raised.value.param == "prompt"
    assert world.engine.requests == []
    await Generation.start(world.frontend, world.ask("a", n=5))
    assert len(world.engine.requests) == 5


@pytest.mark.parametrize("n", [1, 2])
async def test_an_error_in_the_middle_is_raised_typed_after_what_came_before(world, n):
    generation = await Generation.start(world.frontend, world.ask("a", n=n))
    world.engine.emit(0, "x")
    world.engine.fail(0, EngineDeadError("It broke."))
    deltas = generation.deltas()
    assert (await anext(deltas))[1].text == "x"
    with pytest.raises(EngineDeadError, match=r"It broke\."):
        await anext(deltas)
    await generation.aclose()
    assert world.engine.aborted == list(range(1, n))


async def test_an_answer_that_the_engine_could_not_make_is_an_error(world):
    generation = await Generation.start(world.frontend, world.ask("a", n=2))
    world.engine.emit(1, finish_reason=FinishReason.ERROR)
    with pytest.raises(QuireError):
        await generation.collect()
    await generation.aclose()
    assert world.engine.aborted == [0]
