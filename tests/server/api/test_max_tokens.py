"""How many tokens an answer may have. The judge is vLLM (0.33): `get_max_tokens`, `TokenizeParams` and their tests."""

import pytest

pytestmark = pytest.mark.anyio

MAX_MODEL_LEN = 256
NUM_HI_TOKENS = (
    len("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n") - len("<|im_start|><|im_end|><|im_start|>") + 3
)
"""Of the prompt that the template makes of one message "hi": special tokens are one token each, the rest is bytes."""


@pytest.mark.parametrize(
    ("prompt_len", "requested", "expected"),
    [
        (250, 6, 6),
        (250, 7, 6),
        (250, 256, 6),
        (255, 256, 1),
        (1, 256, 255),
        (250, None, 6),
        (1, None, 16),
    ],
)
async def test_what_a_completion_asks_for_is_clamped_to_the_room(world, prompt_len, requested, expected):
    world.engine.answer("x")
    response = await world.complete(prompt=[1] * prompt_len, max_tokens=requested)
    assert response.status_code == 200, response.text
    assert world.engine.requests[0].sampling_params.max_tokens == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, MAX_MODEL_LEN - NUM_HI_TOKENS),
        ({"max_tokens": MAX_MODEL_LEN}, MAX_MODEL_LEN - NUM_HI_TOKENS),
        ({"max_completion_tokens": MAX_MODEL_LEN}, MAX_MODEL_LEN - NUM_HI_TOKENS),
        ({"max_completion_tokens": 3, "max_tokens": 9}, 3),
        ({"max_completion_tokens": 3, "max_tokens": 9999}, 3),
    ],
)
async def test_what_a_chat_asks_for_is_clamped_to_the_room(world, fields, expected):
    world.engine.answer("x")
    response = await world.chat(**fields)
    assert response.status_code == 200, response.text
    assert world.engine.requests[0].sampling_params.max_tokens == expected


async def test_what_the_model_suggests_is_a_default_and_no_ceiling(build_world):
    world = build_world()
    world.load(max_tokens=20)
    world.engine.answer("x")
    for requested in (None, 50):
        await world.chat(max_tokens=requested)
    assert [request.sampling_params.max_tokens for request in world.engine.requests] == [20, 50]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_more_than_the_whole_context_is_refused_by_the_name_of_its_field(world, check_error, field):
    message = check_error(await world.chat(**{field: 257}), 400, param=field, reason="context_length_exceeded")
    assert message.startswith("This model's maximum context length is 256 tokens. However, you requested 257 tokens")
    if field == "max_tokens":
        check_error(await world.complete(max_tokens=257), 400, param=field, reason="context_length_exceeded")
    assert world.engine.requests == []


@pytest.mark.parametrize("prompt_len", [256, 257])
@pytest.mark.parametrize("fields", [{}, {"max_tokens": 1}, {"max_tokens": 256}, {"echo": True}])
async def test_a_prompt_that_leaves_no_room_is_refused(world, check_error, prompt_len, fields):
    response = await world.complete(prompt=[1] * prompt_len, **fields)
    message = check_error(response, 400, param="prompt", reason="context_length_exceeded")
    assert message.startswith(
        f"This model's maximum context length is 256 tokens. However, there are {prompt_len} tokens in the prompt"
    )
    assert world.engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_that_leaves_no_room_is_refused(world, check_error, stream):
    response = await world.chat(messages=[{"role": "user", "content": "x" * 300}], stream=stream)
    check_error(response, 400, param="messages", reason="context_length_exceeded")


async def test_more_tokens_at_least_than_there_is_room_for_are_refused(world, check_error):
    response = await world.complete(prompt=[1] * 250, max_tokens=20, min_tokens=7)
    assert "at most max_tokens, which is 6," in check_error(response, 400, param="min_tokens"), "not the 20 asked for"


@pytest.mark.parametrize(
    ("fields", "num_prompt_tokens", "max_tokens"),
    [
        ({}, 255, 1),
        ({"max_tokens": 9}, 255, 1),
        ({"max_tokens": 256}, 255, 1),
        ({"max_tokens": 0, "echo": True}, 256, 0),
    ],
)
async def test_a_prompt_cut_to_the_context_leaves_room_for_one_token(world, fields, num_prompt_tokens, max_tokens):
    world.engine.answer("x")
    response = await world.complete(prompt=[1] * 999, truncate_prompt_tokens=-1, **fields)
    assert response.status_code == 200, response.text
    (request,) = world.engine.requests
    assert (len(request.prompt_token_ids), request.sampling_params.max_tokens) == (num_prompt_tokens, max_tokens)
