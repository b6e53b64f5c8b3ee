"""What a client may make long: refused before it costs anything, or worked on beside the event loop, in bounds."""

import asyncio
import json
import threading

import msgspec
import pytest

from quire_server.api import answering
from quire_server.api.bodies.json_pieces import PIECE, encode_in_pieces
from quire_server.api.bodies.json_weight import is_too_heavy
from quire_server.api.errors import long_json_response
from quire_server.frontend.text_lanes import LONG_CHARS, VERY_LONG_CHARS
from quire_server.frontend.text_limits import MAX_CUT_BYTES

pytestmark = pytest.mark.anyio

BUDGET_NS = 50_000_000
LONGEST_TOKEN = len("<|endoftext|>")
MAX_MODEL_LEN = 256  # the world's


@pytest.fixture
def encoded(world, monkeypatch):
    """The texts that reach the tokenizer, each with the thread that it is encoded in."""
    seen = []
    encode = type(world.tokenizer).encode

    def spy(self, text, *args, **kwargs):
        if len(text) > 1:  # what the scripted engine answers is shorter
            seen.append((len(text), threading.current_thread()))
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(type(world.tokenizer), "encode", spy)
    return seen


@pytest.mark.parametrize("letter", ["a", "é", "🙂"])
async def test_a_hopeless_prompt_never_reaches_the_tokenizer(world, check_error, encoded, letter):
    prompt = letter * (MAX_MODEL_LEN * LONGEST_TOKEN // len(letter.encode()) + 1)
    message = check_error(await world.complete(prompt=prompt), 400, param="prompt", reason="context_length_exceeded")
    assert "maximum context length is 256 tokens" in message
    messages = [{"role": "user", "content": prompt}]
    check_error(await world.chat(messages=messages), 400, param="messages", reason="context_length_exceeded")
    assert encoded == []


async def test_a_prompt_of_only_the_longest_tokens_is_not_hopeless(world, encoded):
    world.engine.answer("x")
    response = await world.complete(prompt="<|endoftext|>" * (MAX_MODEL_LEN - 1), max_tokens=1)
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens"] == MAX_MODEL_LEN - 1


async def test_a_prompt_that_is_cut_may_be_longer(world, check_error, encoded):
    world.engine.answer("x")
    response = await world.complete(prompt="a" * 100_000, truncate_prompt_tokens=3)
    assert (response.status_code, response.json()["usage"]["prompt_tokens"]) == (200, 3)
    response = await world.complete(prompt="a" * (MAX_CUT_BYTES + 1), truncate_prompt_tokens=3)
    check_error(response, 400, param="prompt", reason="context_length_exceeded")
    assert [size for size, _ in encoded] == [100_000]


async def test_more_ids_than_are_listed_are_refused_without_a_list_of_them(world, check_error):
    response = await world.http.post("/tokenize", json={"prompt": "a" * 600_000})
    assert "600000 tokens" in check_error(response, 400, reason="context_length_exceeded")


async def test_long_texts_are_encoded_in_threads_and_short_ones_at_once(world, encoded):
    world.engine.answer("x")
    for size in (100, LONG_CHARS, VERY_LONG_CHARS):
        assert (await world.http.post("/tokenize", json={"prompt": "a" * size})).json()["count"] == size
    names = [thread.name.partition("_")[0] for _, thread in encoded]
    assert names == [threading.current_thread().name, "long-texts", "very-long-texts"]


LONG_CALL = {"name": "f", "arguments": {"a": "b" * LONG_CHARS}}
HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "a" * LONG_CHARS}]},
        {"messages": [{"role": "user", "content": ["a" * LONG_CHARS]}]},
        {"messages": [{"role": "user", "content": ""}] * 100},
        {"messages": [{"role": "assistant", "content": "", "reasoning": "a" * LONG_CHARS}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": LONG_CALL}]}]},
        {"messages": [{"role": "assistant", "function_call": LONG_CALL}]},
        {"messages": HI, "tools": [{"function": {"name": "f", "description": "a" * LONG_CHARS}}]},
        {"messages": HI, "chat_template_kwargs": {"mood": "a" * LONG_CHARS}},
    ],
)
async def test_long_conversations_are_rendered_in_threads(world, monkeypatch, body):
    threads = []
    render = type(world.tokenizer).apply_chat_template

    def spy(self, *args, **kwargs):
        threads.append(threading.current_thread())
        return render(self, *args, **kwargs)

    monkeypatch.setattr(type(world.tokenizer), "apply_chat_template", spy)
    assert (await world.http.post("/tokenize", json=body)).status_code == 200
    assert [thread.name.partition("_")[0] for thread in threads] == ["long-texts"]


@pytest.mark.parametrize("stop", [["a"] * 1025, ["a" * 8193, "b" * 8192]])
async def test_stop_strings_are_bounded(world, check_error, stop):
    assert "at most 1024 strings" in check_error(await world.complete(stop=stop), 400, param="stop")


async def test_many_short_prompts_let_others_have_their_turn(world):
    world.engine.answer("x")
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(others())
    before = turns
    answer = asyncio.ensure_future(world.complete(prompt=["a"] * 50))
    while not world.engine.requests:
        await asyncio.sleep(0)
    assert turns - before >= 49
    task.cancel()
    assert len((await answer).json()["choices"]) == 50


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_who_leaves_while_long_texts_wait_leaves_no_work_behind(world, encoded, path):
    go = threading.Event()
    blocker = asyncio.ensure_future(world.frontend.lanes.run(VERY_LONG_CHARS, go.wait))
    body = {"prompt": "a" * VERY_LONG_CHARS} | ({"truncate_prompt_tokens": 3} if path != "/tokenize" else {})
    exchange = world.exchange(path, body)
    while world.frontend.lanes.num_waiting < 2:
        await asyncio.sleep(0)
    await exchange.hang_up()
    assert (await exchange.next_message())["status"] == 499
    go.set()
    await blocker
    assert await world.frontend.lanes.run(VERY_LONG_CHARS, lambda: "next") == "next"
    assert encoded == []


async def test_a_long_answer_is_shaped_in_a_thread(world, monkeypatch):
    threads = []
    monkeypatch.setattr(
        answering,
        "long_json_response",
        lambda content: threads.append(threading.current_thread()) or long_json_response(content),
    )
    world.engine.answer("x")
    for prompt in ("a", [7] * 200):
        assert (await world.complete(prompt=prompt, n=1)).status_code == 200
    long = await world.complete(prompt=[[7] * 200] * 3)
    assert [choice["text"] for choice in long.json()["choices"]] == ["x"] * 3
    assert [thread is threading.current_thread() for thread in threads] == [False]


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"prompt": "a, [b] {c: 1e300}, " * 100_000}),
        json.dumps({"prompt": 'a "b" \\ ' * 100_000}),
        json.dumps({"prompt": list(range(131_072))}),
        json.dumps({"messages": [{"role": "user", "content": "x" * 1000, "flag": True}] * 1000}),
    ],
)
def test_bodies_that_people_send_are_not_too_heavy(body):
    assert not is_too_heavy(body.encode(), BUDGET_NS)


@pytest.mark.parametrize(
    "body",
    [
        "[" + "[1]," * 200_000 + "1]",
        "[" + "1e300," * 2000 + "1]",
        "[" + "1," * 600_000 + "1]",
        "{" + ",".join(f'"{key}":1' for key in range(200_000)) + "}",
        '["' + "\\n" * 5_000_000 + '"]',
    ],
)
def test_bodies_of_too_many_values_are_too_heavy(body):
    assert is_too_heavy(body.encode(), BUDGET_NS)


async def test_a_heavy_body_is_413(world, check_error):
    body = b'{"messages": [], "metadata": [' + b"[1]," * 400_000 + b"1]}"
    response = await world.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert "--max-request-body-bytes" in check_error(response, 413, reason="payload_too_large")


class _Item(msgspec.Struct):
    texts: list[str]


class _Answer(msgspec.Struct, omit_defaults=True):
    ids: list[int]
    items: list[_Item]
    more: list[dict[int, str] | None] | msgspec.UnsetType = msgspec.UNSET


@pytest.mark.parametrize("num", [0, 1, PIECE, PIECE + 1, 3 * PIECE])
def test_pieces_make_the_same_json(num):
    answer = _Answer(ids=list(range(num)), items=[_Item(["é"] * num), _Item([])], more=[None, *([{1: '"'}] * num)])
    assert encode_in_pieces(answer) == msgspec.json.encode(answer)
    assert encode_in_pieces(_Answer([], [])) == b'{"ids":[],"items":[]}'
