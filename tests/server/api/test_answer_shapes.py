"""Which keys answers and chunks have, and what usage says on the way. The judge is vLLM (0.33) and its tests."""

import pytest

pytestmark = pytest.mark.anyio

WHOLE = {
    *("id", "object", "created", "model", "choices", "usage", "system_fingerprint"),
    *("service_tier", "kv_transfer_params"),
}
CHUNK = {"id", "object", "created", "model", "choices"}


def nulls(value):
    return {name for name, item in value.items() if item is None}


async def test_a_whole_chat_answer_has_vllms_null_keys(world):
    world.engine.answer("x")
    body = (await world.chat()).json()
    assert body.keys() == WHOLE | {"prompt_logprobs", "prompt_token_ids"}
    assert nulls(body) == {"service_tier", "prompt_logprobs", "prompt_token_ids", "kv_transfer_params"}
    (choice,) = body["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids"}
    assert nulls(choice) == {"logprobs", "stop_reason", "token_ids"}
    assert nulls(choice["message"]) == {"refusal", "annotations", "audio", "function_call", "reasoning"}


async def test_a_whole_completion_has_vllms_null_keys(world):
    world.engine.answer("x")
    body = (await world.complete()).json()
    assert (body.keys(), nulls(body)) == (WHOLE, {"service_tier", "kv_transfer_params"})
    (choice,) = body["choices"]
    unasked = {"logprobs", "stop_reason", "token_ids", "prompt_logprobs", "prompt_token_ids"}
    assert (choice.keys(), nulls(choice)) == ({"index", "text", "finish_reason"} | unasked, unasked)


async def test_chunks_of_a_chat_have_the_null_keys_of_their_place(world, parse_events):
    """vLLM writes into a chunk what it sets for it: ids of the prompt in the first, those of the answer after it."""
    world.engine.answer("x", "y")
    first, middle, last = parse_events((await world.chat(stream=True)).text)
    assert (first.keys() - CHUNK, nulls(first)) == ({"prompt_token_ids"}, {"prompt_token_ids"})
    assert first["choices"][0].keys() == {"index", "delta", "logprobs", "finish_reason"}
    assert (middle.keys() - CHUNK, nulls(middle)) == ({"kv_transfer_params"}, {"kv_transfer_params"})
    assert middle["choices"][0].keys() == {"index", "delta", "logprobs", "finish_reason", "token_ids"}
    assert last.keys() - CHUNK == {"kv_transfer_params", "system_fingerprint"}
    assert last["choices"][0].keys() == middle["choices"][0].keys() | {"stop_reason"}


async def test_chunks_of_a_completion_have_vllms_null_keys(world, parse_events):
    world.engine.answer("x", "y")
    usage = {"include_usage": True}
    first, _, end = parse_events((await world.complete(stream=True, stream_options=usage)).text)
    assert first.keys() - CHUNK == {"kv_transfer_params"}
    unasked = {"logprobs", "finish_reason", "stop_reason", "token_ids", "prompt_token_ids"}
    assert nulls(first["choices"][0]) == unasked
    assert first["choices"][0].keys() == {"index", "text"} | unasked
    assert end.keys() - CHUNK == {"usage", "system_fingerprint"}


def completion_tokens(chunks):
    return [chunk["usage"]["completion_tokens"] for chunk in chunks]


@pytest.mark.parametrize("stream_options", [None, {"include_usage": False, "continuous_usage_stats": False}])
async def test_the_flag_puts_usage_on_every_chunk(build_world, parse_events, stream_options):
    """As vLLM's `should_include_usage` and test_enable_force_include_usage."""
    world = build_world(enable_force_include_usage=True)
    world.load()
    world.engine.answer("ab", "c")
    asked = {"stream": True, "stream_options": stream_options}
    chat = parse_events((await world.chat(**asked)).text)
    assert completion_tokens(chat) == [0, 2, 3, 3]
    assert chat[-1]["choices"] == []
    assert completion_tokens(parse_events((await world.complete(**asked)).text)) == [2, 3, 3]
    for chunk in chat:
        usage = chunk["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_before_the_first_token_no_token_was_made(world, parse_events):
    """Role and echo, though the token may be there by the time that they are written."""
    world.engine.answer("ab")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once"}]
    response = await world.chat(
        messages=messages,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        add_generation_prompt=False,
        continue_final_message=True,
        echo=True,
    )
    chunks = parse_events(response.text)
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[:3]] == ["", "Once", "ab"]
    assert completion_tokens(chunks) == [0, 0, 2, 2]


async def test_usage_on_the_way_is_that_of_the_choice_and_at_the_end_that_of_all(world, parse_events):
    world.engine.answer("ab")
    response = await world.complete(
        prompt=["x", "yz"], stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    *chunks, end = parse_events(response.text)
    seen = {chunk["choices"][0]["index"]: chunk["usage"] for chunk in chunks}
    assert {index: usage["prompt_tokens"] for index, usage in seen.items()} == {0: 1, 1: 2}
    assert {index: usage["completion_tokens"] for index, usage in seen.items()} == {0: 2, 1: 2}
    assert (end["usage"]["prompt_tokens"], end["usage"]["completion_tokens"]) == (3, 4)
