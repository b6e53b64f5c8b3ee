"""Every field of a request reaches the engine, or is refused by name."""

import msgspec
import pytest

from quire_server.api.openai.schemas.requests import UNSERVED, ChatCompletionRequest, CompletionRequest

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", 0.5, 0.5),
        ("top_p", 0.5, 0.5),
        ("top_k", 5, 5),
        ("top_k", 10**9, 300),
        ("min_p", 0.25, 0.25),
        ("presence_penalty", -1.5, -1.5),
        ("frequency_penalty", 1.5, 1.5),
        ("repetition_penalty", 1.25, 1.25),
        ("logit_bias", {"5": 250, "6": -1}, {5: 100.0, 6: -1.0}),
        ("allowed_token_ids", [1, 2], (1, 2)),
        ("seed", 7, 7),
        ("stop", "x", ("x",)),
        ("stop", ["x", "y"], ("x", "y")),
        ("stop_token_ids", [3], (3,)),
        ("include_stop_str_in_output", True, True),
        ("ignore_eos", True, True),
        ("max_tokens", 3, 3),
        ("min_tokens", 2, 2),
        ("prompt_logprobs", 2, 2),
        ("skip_special_tokens", False, False),
        ("spaces_between_special_tokens", False, False),
    ],
)
async def test_fields_reach_the_engine(world, field, value, expected):
    world.engine.answer("z")
    for ask in (world.chat, world.complete):
        response = await ask(**{field: value})
        assert response.status_code == 200, response.text
        assert getattr(world.engine.requests[-1].sampling_params, field) == expected


async def test_request_options_reach_the_engine(build_world):
    world = build_world(scheduler={"policy": "priority"})
    world.load()
    world.engine.answer("z")
    body = (await world.chat(priority=-3, cache_salt="s", request_id="mine")).json()
    assert body["id"] == "chatcmpl-mine"
    (request,) = world.engine.requests
    assert (request.priority, request.cache_salt) == (-3, "s")
    assert request.eos_token_ids == world.tokenizer.eos_token_ids
    assert request.arrival_time > 0
    await world.chat(request_id="mine")
    assert world.engine.requests[1].request_id != request.request_id


async def test_defaults_come_from_the_models_generation_config(build_world):
    world = build_world()
    world.load(temperature=0.25, top_p=0.5, top_k=7, repetition_penalty=1.5, max_tokens=11)
    world.engine.answer("z")
    await world.chat()
    params = world.engine.requests[0].sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.25, 0.5, 7, 1.5)
    assert params.max_tokens == 11
    await world.chat(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_tokens=3)
    params = world.engine.requests[1].sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert params.max_tokens == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", -2),
        ("min_p", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("logit_bias", {"300": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"x": 1}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [300]),
        ("stop_token_ids", [-1]),
        ("stop", ""),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", 99),
        ("prompt_logprobs", 21),
        ("n", 0),
        ("n", 1000),
        ("seed", 2**64),
        ("seed", "x"),
        ("temperature", "hot"),
        ("stream", "maybe"),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", 257),
        ("priority", 1),
        ("cache_salt", ""),
        ("request_id", "x" * 257),
        ("stream_options", {"include_usage": True}),
    ],
)
async def test_bad_values_are_refused_by_name(world, check_error, field, value):
    for ask in (world.chat, world.complete):
        fields = {"max_tokens": 9, field: value}
        check_error(await ask(**fields), 400, param=field)
    assert world.engine.requests == []


@pytest.mark.parametrize(
    ("logit_bias", "bad"),
    [
        ({"not_a_token_id": 50}, ["'not_a_token_id'"]),
        ({"bad1": 50.0, "5": 1, "bad2": 20.0}, ["'bad1'", "'bad2'", "2 of its keys"]),
        ({"1": "not_a_number"}, ["'1'"]),
        ({"1": "nan"}, ["'1'"]),
        ({"1": None}, ["'1'"]),
        ({"1.5": 1}, ["'1.5'"]),
        ({"x" * 1000: 1}, ["'" + "x" * 64 + "'"]),
        ({"301": 1.0}, ["301", "300"]),
    ],
)
async def test_a_bad_logit_bias_names_every_bad_key(world, check_error, logit_bias, bad):
    """As vLLM's test_chat_logit_bias_validation asks."""
    for ask in (world.chat, world.complete):
        message = check_error(await ask(logit_bias=logit_bias), 400, param="logit_bias")
        assert all(word in message for word in bad), message
        assert len(message) < 300


async def test_logit_bias_in_other_spellings(world):
    world.engine.answer("x")
    await world.chat(logit_bias={" 5": "1.5", "6": "inf", "7": True})
    assert world.engine.requests[0].sampling_params.logit_bias == {5: 1.5, 6: 100.0, 7: 1.0}


async def test_top_logprobs_need_logprobs(world, check_error):
    check_error(await world.chat(top_logprobs=2), 400, param="top_logprobs")
    check_error(await world.chat(logprobs=True, top_logprobs=21), 400, param="top_logprobs")


async def test_prompt_logprobs_are_not_streamed(world, check_error):
    check_error(await world.chat(stream=True, prompt_logprobs=1), 400, param="prompt_logprobs")


WANTED = {
    "best_of": 2,
    "use_beam_search": True,
    "early_stopping": True,
    "response_format": {"type": "json_object"},
    "bad_words": ["x"],
    "suffix": "x",
    "length_penalty": 0.5,
    "watermarking": True,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "function_call": {"name": "f"},
    "modalities": ["audio"],
}
"""A value that asks for something, where `{"x": 1}` would not be typical."""


@pytest.mark.parametrize("field", UNSERVED)
async def test_fields_that_are_not_served_are_refused_by_name(world, check_error, field):
    served_by = [(CompletionRequest, world.complete), (ChatCompletionRequest, world.chat)]
    asks = [ask for struct, ask in served_by if field in struct.__struct_fields__]
    assert asks
    for ask in asks:
        message = check_error(await ask(**{field: WANTED.get(field, {"x": 1})}), 400, param=field)
        assert f"`{field}`" in message
    assert world.engine.requests == []
    world.engine.answer("z")
    for ask in asks:
        for neutral in (None, *UNSERVED[field]):
            response = await ask(**{field: msgspec.to_builtins(neutral)})
            assert response.status_code == 200, (field, neutral, response.text)


async def test_fields_that_change_nothing_are_accepted(world):
    world.engine.answer("z")
    common = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    assert (await world.complete(**common)).status_code == 200
    chat = {"parallel_tool_calls": True, "prediction": None, "verbosity": "low", "reasoning_effort": "low"}
    assert (await world.chat(**common, **chat)).status_code == 200
