"""POST /v1/chat/completions against a scripted engine."""

import pytest

from quire_server.engine.output import EngineCoreOutput, TokenLogprobs
from quire_server.engine.request import FinishReason
from quire_server.shared.errors import InternalError, encode_error

pytestmark = pytest.mark.anyio


async def test_answers_a_conversation(world):
    world.engine.answer("Hel", "lo")
    response = await world.chat(model="alias", max_tokens=5)
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "alias"
    assert body["system_fingerprint"].startswith("fp_")
    (choice,) = body["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", "Hello")
    (request,) = world.engine.requests
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert request.prompt_token_ids == world.tokenizer.encode(prompt, add_special_tokens=False)
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": 5,
        "total_tokens": len(request.prompt_token_ids) + 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_streams_role_then_deltas_then_finish_then_done(world, parse_events):
    world.engine.answer("Hel", "lo")
    response = await world.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    first, *middle, last = parse_events(response.text)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert [chunk["choices"][0]["delta"] for chunk in middle] == [{"content": "Hel"}]
    assert last["choices"][0]["delta"] == {"content": "lo"}
    assert last["choices"][0]["finish_reason"] == "length"
    assert "system_fingerprint" in last
    assert "system_fingerprint" not in first
    assert "usage" not in last
    assert len({chunk["id"] for chunk in (first, *middle, last)}) == 1


async def test_tokens_that_come_together_go_in_one_chunk(world, parse_events):
    exchange = world.exchange("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True})
    request = await world.engine.next_request()
    for letter in "abc":
        world.engine.emit(world.engine.output(request, letter))
    world.engine.emit(world.engine.output(request, "d", finish_reason=FinishReason.STOP))
    await exchange.task
    body = b"".join([(await exchange.next_message()).get("body", b"") for _ in range(4)])
    _, only = parse_events(body.decode())
    assert only["choices"][0]["delta"] == {"content": "abc"}


@pytest.mark.parametrize(
    ("options", "num_with_usage"),
    [({}, 0), ({"include_usage": True}, 1), ({"include_usage": True, "continuous_usage_stats": True}, 4)],
)
async def test_usage_in_streams(world, parse_events, options, num_with_usage):
    world.engine.answer("Hel", "lo", num_cached_tokens=16)
    response = await world.chat(stream=True, stream_options=options)
    chunks = parse_events(response.text)
    with_usage = [chunk for chunk in chunks if "usage" in chunk]
    assert len(with_usage) == num_with_usage
    if with_usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 5
        assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    if num_with_usage == 4:
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 3, 5, 5]


async def test_several_answers_are_engine_requests_with_their_own_seeds(world, parse_events):
    world.engine.answer("a", "b")
    body = (await world.chat(n=3, seed=2**63 - 2)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["ab"] * 3
    assert [request.sampling_params.seed for request in world.engine.requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert len({request.request_id for request in world.engine.requests}) == 3
    assert body["usage"]["prompt_tokens"] == len(world.engine.requests[0].prompt_token_ids)
    assert body["usage"]["completion_tokens"] == 6
    chunks = parse_events((await world.chat(n=2, stream=True)).text)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == {0: "ab", 1: "ab"}
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in chunks) == 2


async def test_several_answers_need_sampling(world, check_error):
    check_error(await world.chat(n=2, temperature=0), 400, param="n")


async def test_logprobs(world, parse_events):
    ids = world.tokenizer.encode("hé")
    positions = [(ids[0], -0.5, 1, [(ids[0], -0.5), (ids[1], float("-inf"))]), (ids[1], -1.0, 2, [(ids[0], -0.1)])]

    def script(request):
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=ids[:2],
            logprobs=_logprobs(positions),
            finish_reason=FinishReason.LENGTH,
        )
        return [output]

    world.engine.script = script
    choice = (await world.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    assert world.engine.requests[0].sampling_params.logprobs == 2
    first, second = choice["logprobs"]["content"]
    assert first == {
        "token": "h",
        "logprob": -0.5,
        "bytes": [104],
        "top_logprobs": [
            {"token": "h", "logprob": -0.5, "bytes": [104]},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xC3]},
        ],
    }
    assert (second["token"], second["bytes"]) == ("\ufffd", [0xC3])
    chunks = parse_events((await world.chat(logprobs=True, stream=True, return_tokens_as_token_ids=True)).text)
    assert world.engine.requests[1].sampling_params.logprobs == 0
    assert chunks[-1]["choices"][0]["logprobs"]["content"][0]["token"] == f"token_id:{ids[0]}"


def _logprobs(positions):
    return [TokenLogprobs(*position) for position in positions]


async def test_prompt_logprobs(world):
    world.engine.answer("x", prompt_logprobs=_logprobs([(72, -0.5, 3, [(71, -0.25)])]))
    body = (await world.chat(prompt_logprobs=1)).json()
    name = world.tokenizer.token_text
    assert body["prompt_logprobs"] == [
        None,
        {
            "71": {"logprob": -0.25, "rank": 1, "decoded_token": name(71)},
            "72": {"logprob": -0.5, "rank": 3, "decoded_token": name(72)},
        },
    ]


async def test_token_ids_are_returned_where_asked_for(world, parse_events):
    world.engine.answer("a", "b")
    body = (await world.chat(return_token_ids=True)).json()
    prompt_ids = world.engine.requests[0].prompt_token_ids
    assert body["prompt_token_ids"] == prompt_ids
    assert body["choices"][0]["token_ids"] == world.tokenizer.encode("ab")
    chunks = parse_events((await world.chat(return_token_ids=True, stream=True)).text)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt_ids, None, None]
    ids = [id_ for chunk in chunks for id_ in chunk["choices"][0].get("token_ids", [])]
    assert ids == world.tokenizer.encode("ab")


async def test_final_message_is_continued_and_echoed(world, parse_events):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once"}]
    world.engine.answer(" upon")
    body = (await world.chat(messages=messages, continue_final_message=True, echo=True)).json()
    message = body["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", "Once upon")
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nOnce"
    assert world.engine.requests[0].prompt_token_ids == world.tokenizer.encode(prompt)
    response = await world.chat(messages=messages, continue_final_message=True, echo=True, stream=True)
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in parse_events(response.text)]
    assert contents == ["", "Once", " upon"]


async def test_template_options(world):
    world.engine.answer("x")
    await world.chat(chat_template_kwargs={"mood": "calm"}, add_generation_prompt=False)
    prompt = "<|im_start|>user\nhi<|im_end|>\n[calm]"
    assert world.engine.requests[0].prompt_token_ids == world.tokenizer.encode(prompt)


@pytest.mark.parametrize("name", ["messages", "chat_template", "self", "tools", "add_generation_prompt"])
async def test_template_kwargs_cannot_replace_arguments(world, check_error, name):
    response = await world.chat(chat_template_kwargs={name: "x"})
    check_error(response, 400, param=f"chat_template_kwargs.{name}")


@pytest.mark.parametrize("name", ["tokenizer", "options", "source", "variables", "args", "environment"])
async def test_template_kwargs_may_have_any_other_name(chat_template_world, name):
    """Also that of a parameter on the way to the template; with vLLM, such a variable reaches the template."""
    world = chat_template_world("{{ " + name + " }}")
    world.engine.answer("x")
    response = await world.chat(chat_template_kwargs={name: "mine"})
    assert response.status_code == 200, response.text
    assert world.tokenizer.decode(world.engine.requests[0].prompt_token_ids) == "mine"


async def test_a_function_call_of_history_is_shown_as_the_tool_call_that_replaced_it(chat_template_world):
    """The judge is the API's own other spelling: OpenAI documents `function_call` as replaced by `tool_calls`."""
    world = chat_template_world(
        "{% for message in messages %}{% for call in message.tool_calls or [] %}"
        "{{ call.function.name }} {{ call.function.arguments | tojson }};{% endfor %}{% endfor %}"
    )
    world.engine.answer("x")
    call = {"name": "weather", "arguments": '{"city": "Prague"}'}
    other = {"name": "other", "arguments": "{}"}
    for fields in (
        {"function_call": call},
        {"tool_calls": [{"type": "function", "function": call}]},
        {"tool_calls": [{"type": "function", "function": call}], "function_call": other},
    ):
        response = await world.chat(messages=[{"role": "assistant", "content": None, **fields}])
        assert response.status_code == 200, response.text
        assert "x-quire-ignored-fields" not in response.headers
    prompts = [world.tokenizer.decode(request.prompt_token_ids) for request in world.engine.requests]
    assert prompts == ['weather {"city": "Prague"};'] * 3


async def test_messages_of_every_kind_reach_the_template(world):
    world.engine.answer("x")
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "audio": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    response = await world.chat(messages=messages)
    assert response.status_code == 200, response.text
    prompt = world.tokenizer.decode(world.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": 7, "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
    ],
)
async def test_bad_messages(world, check_error, messages, param):
    check_error(await world.chat(messages=messages), 400, param=param)
    assert world.engine.requests == []


async def test_stop_strings_end_the_answer_and_the_engine_request(world):
    exchange = world.exchange(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stop": "END", "stream": True}
    )
    request = await world.engine.next_request()
    world.engine.emit(world.engine.output(request, "well EN"))
    start = await exchange.next_message()
    assert start["status"] == 200
    assert b"well " in (await exchange.next_message())["body"]
    world.engine.emit(world.engine.output(request, "D of it"))
    last = (await exchange.next_message())["body"]
    assert b'"finish_reason":"stop","stop_reason":"END"' in last
    assert b"EN" not in last.replace(b'"END"', b"")
    await exchange.task
    assert world.engine.aborted == [request.request_id]


async def test_engine_error_on_one_request_is_a_500(world, check_error, parse_events):
    world.engine.answer("x", finish=FinishReason.ERROR, error=encode_error(InternalError("The logits are NaN.")))
    assert check_error(await world.chat(), 500, reason="internal_error") == "The logits are NaN."
    *_, last = parse_events((await world.chat(stream=True)).text)
    assert last["error"]["message"] == "The logits are NaN."
