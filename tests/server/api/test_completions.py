"""POST /v1/completions against a scripted engine."""

import pytest

from quire_server.engine.output import EngineCoreOutput, TokenLogprobs
from quire_server.engine.request import FinishReason
from quire_server.shared.errors import ContextLengthError, InternalError, InvalidRequestError, QueueFullError

pytestmark = pytest.mark.anyio

MAX_MODEL_LEN = 256


async def test_continues_a_text(world):
    world.engine.answer(" th", "ere", finish=FinishReason.LENGTH)
    body = (await world.complete()).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, " there", "length")
    assert body["usage"]["total_tokens"] == 2 + 6
    assert world.engine.requests[0].prompt_token_ids == world.tokenizer.encode("hi")
    assert world.engine.requests[0].sampling_params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
async def test_prompts_of_every_kind(world, prompt, expected):
    world.engine.answer("x")
    body = (await world.complete(prompt=prompt)).json()
    ids = [world.tokenizer.encode(item) if isinstance(item, str) else item for item in expected]
    assert [request.prompt_token_ids for request in world.engine.requests] == ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize("prompt", [[], "", [""], [[]], ["a", []], ["a", 1], [[1], "a"], [1, [2]], None])
async def test_bad_prompts(world, check_error, prompt):
    param = f"prompt[{len(prompt) - 1}]" if prompt and [] in prompt else "prompt"
    check_error(await world.complete(prompt=prompt), 400, param=param)
    assert world.engine.requests == []


async def test_several_prompts_and_answers_number_their_choices(world, parse_events):
    texts = iter(["a1", "a2", "b1", "b2"])
    world.engine.script = lambda request: [world.engine.output(request, next(texts), finish_reason=FinishReason.LENGTH)]
    body = (await world.complete(prompt=["a", "b"], n=2)).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "a1"), (1, "a2"), (2, "b1"), (3, "b2"),
    ]  # fmt: skip
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 8


async def test_streams(world, parse_events):
    world.engine.answer(" th", "ere")
    response = await world.complete(stream=True, stream_options={"include_usage": True})
    first, second, usage = parse_events(response.text)
    assert (first["choices"][0]["text"], first["choices"][0]["finish_reason"]) == (" th", None)
    assert second["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 6)


async def test_streams_of_several_prompts(world, parse_events):
    world.engine.answer("x", "y")
    chunks = parse_events((await world.complete(prompt=["a", "b", "c"], stream=True)).text)
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["xy"] * 3


@pytest.mark.parametrize("stream", [False, True])
async def test_each_choice_echoes_its_own_prompt(world, parse_events, stream):
    world.engine.answer("x")
    response = await world.complete(prompt=["a", "b"], n=2, echo=True, stream=stream)
    bodies = parse_events(response.text) if stream else [response.json()]
    index_to_text = {choice["index"]: choice["text"] for body in bodies for choice in body["choices"]}
    assert index_to_text == {0: "ax", 1: "ax", 2: "bx", 3: "bx"}


@pytest.mark.parametrize("prompt", ["hi", [[71, 72]]])
async def test_echo(world, parse_events, prompt):
    world.engine.answer("x", "y")
    text = prompt if isinstance(prompt, str) else world.tokenizer.decode(prompt[0])
    body = (await world.complete(prompt=prompt, echo=True)).json()
    assert body["choices"][0]["text"] == text + "xy"
    chunks = parse_events((await world.complete(prompt=prompt, echo=True, stream=True)).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [text + "x", "y"]


async def test_echo_of_a_truncated_prompt_is_what_the_model_saw(world):
    world.engine.answer("x")
    body = (await world.complete(prompt="abcdef", truncate_prompt_tokens=3, echo=True)).json()
    assert body["choices"][0]["text"] == "defx"
    body = (await world.complete(prompt="abcdef", truncate_prompt_tokens=3, truncation_side="right", echo=True)).json()
    assert body["choices"][0]["text"] == "abcx"


def _script_with_logprobs(world):
    ids = world.tokenizer.encode("abxy")

    def position(i: int, logprob: float) -> TokenLogprobs:
        return TokenLogprobs(ids[i], logprob, 2, [(ids[0], -0.125)])

    def script(request):
        return [
            EngineCoreOutput(request_id=request.request_id, prompt_logprobs=[position(1, -0.5)]),
            EngineCoreOutput(request_id=request.request_id, new_token_ids=ids[2:3], logprobs=[position(2, -1.0)]),
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=ids[3:],
                logprobs=[position(3, float("-inf"))],
                finish_reason=FinishReason.LENGTH,
            ),
        ]

    world.engine.script = script


async def test_logprobs(world, parse_events):
    _script_with_logprobs(world)
    body = (await world.complete(prompt="ab", logprobs=1)).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["x", "y"],
        "token_logprobs": [-1.0, -9999.0],
        "top_logprobs": [{"a": -0.125, "x": -1.0}, {"a": -0.125, "y": -9999.0}],
        "text_offset": [0, 1],
    }
    assert world.engine.requests[0].sampling_params.prompt_logprobs is None
    chunks = parse_events((await world.complete(prompt="ab", logprobs=1, stream=True)).text)
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [1]]


async def test_tokens_that_are_not_whole_characters_are_named_by_their_bytes(world):
    first, second = world.tokenizer.encode("é")
    positions = [TokenLogprobs(first, -1.0, 1, [(first, -1.0), (second, -2.0)])]
    world.engine.script = lambda request: [
        EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[first],
            logprobs=positions,
            finish_reason=FinishReason.LENGTH,
        )
    ]
    logprobs = (await world.complete(logprobs=2)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3"]
    assert logprobs["top_logprobs"] == [{"bytes:\\xc3": -1.0, "bytes:\\xa9": -2.0}]


async def test_echo_with_logprobs_begins_with_the_prompts(world, parse_events):
    _script_with_logprobs(world)
    body = (await world.complete(prompt="ab", logprobs=1, echo=True)).json()
    assert world.engine.requests[0].sampling_params.prompt_logprobs == 1
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "x", "y"],
        "token_logprobs": [None, -0.5, -1.0, -9999.0],
        "top_logprobs": [None, {"a": -0.125, "b": -0.5}, {"a": -0.125, "x": -1.0}, {"a": -0.125, "y": -9999.0}],
        "text_offset": [0, 1, 2, 3],
    }
    chunks = parse_events((await world.complete(prompt="ab", logprobs=1, echo=True, stream=True)).text)
    first, second = [chunk["choices"][0] for chunk in chunks]
    assert (first["text"], first["logprobs"]["tokens"]) == ("abx", ["a", "b", "x"])
    assert (second["logprobs"]["tokens"], second["logprobs"]["text_offset"]) == (["y"], [3])


@pytest.mark.parametrize("prompt_len", [2, MAX_MODEL_LEN])
async def test_echo_with_no_new_tokens_scores_the_prompt(world, parse_events, prompt_len):
    """As the engine answers `max_tokens` 0: the prompt's log-probabilities, no token, and the end."""
    a, b = world.tokenizer.encode("ab")
    scored = [TokenLogprobs(b, -0.5, 2, [(a, -0.125)])] * (prompt_len - 1)
    world.engine.script = lambda request: [
        EngineCoreOutput(request_id=request.request_id, prompt_logprobs=scored),
        EngineCoreOutput(request_id=request.request_id, finish_reason=FinishReason.LENGTH),
    ]
    prompt = [a] + [b] * (prompt_len - 1)
    text = "a" + "b" * (prompt_len - 1)
    response = await world.complete(prompt=prompt, logprobs=1, echo=True, max_tokens=0)
    assert response.status_code == 200
    body = response.json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == (text, "length", list(text))
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (prompt_len, 0)
    assert world.engine.requests[0].sampling_params.max_tokens == 0
    response = await world.complete(prompt=prompt, logprobs=1, echo=True, max_tokens=0, stream=True)
    (chunk,) = parse_events(response.text)
    expected = [None] + [-0.5] * (prompt_len - 1)
    assert (chunk["choices"][0]["text"], chunk["choices"][0]["logprobs"]["token_logprobs"]) == (text, expected)


@pytest.mark.parametrize("prompt_len", [2, MAX_MODEL_LEN])
async def test_echo_with_neither_tokens_nor_logprobs_is_the_prompt(world, prompt_len):
    world.engine.answer("", finish=FinishReason.LENGTH)
    (choice,) = (await world.complete(prompt=[7] * prompt_len, echo=True, max_tokens=0)).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (world.tokenizer.decode([7] * prompt_len), "length")


async def test_a_prompt_that_is_too_long_to_score_is_refused(world, check_error):
    response = await world.complete(prompt=[1] * (MAX_MODEL_LEN + 1), logprobs=1, echo=True, max_tokens=0)
    message = check_error(response, 400, param="prompt", reason="context_length_exceeded")
    assert "there are 257 tokens in the prompt" in message


@pytest.mark.parametrize(
    ("error", "status", "param", "reason"),
    [
        (InvalidRequestError("No.", "logit_bias"), 400, "logit_bias", None),
        (ContextLengthError("Too long.", "prompt"), 400, "prompt", "context_length_exceeded"),
        (QueueFullError("Full.", 7.0), 429, None, "queue_full"),
        (InternalError("A bug."), 500, None, "internal_error"),
    ],
)
async def test_a_refusal_inside_the_engine_keeps_its_status(
    world, check_error, parse_events, error, status, param, reason
):
    world.engine.script = lambda request: [EngineCoreOutput.failed(request.request_id, error)]
    response = await world.complete()
    assert check_error(response, status, param=param, reason=reason) == str(error)
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)
    *_, last = parse_events((await world.complete(stream=True)).text)
    assert (last["error"]["message"], last["error"]["code"], last["error"]["reason"]) == (str(error), status, reason)


async def test_prompt_logprobs_per_choice(world):
    _script_with_logprobs(world)
    body = (await world.complete(prompt="ab", prompt_logprobs=1)).json()
    prompt_logprobs = body["choices"][0]["prompt_logprobs"]
    b = str(world.tokenizer.encode("b")[0])
    assert prompt_logprobs[0] is None
    assert prompt_logprobs[1][b] == {"logprob": -0.5, "rank": 2, "decoded_token": "b"}


async def test_token_ids_are_returned_where_asked_for(world, parse_events):
    world.engine.answer("x", "y")
    (choice,) = (await world.complete(return_token_ids=True)).json()["choices"]
    assert choice["prompt_token_ids"] == world.tokenizer.encode("hi")
    assert choice["token_ids"] == world.tokenizer.encode("xy")
    chunks = parse_events((await world.complete(return_token_ids=True, stream=True)).text)
    assert [chunk["choices"][0]["prompt_token_ids"] for chunk in chunks] == [world.tokenizer.encode("hi"), None]


@pytest.mark.parametrize("stream", [False, True])
async def test_one_refused_prompt_ends_the_others(build_world, check_error, stream):
    world = build_world(scheduler={"max_num_queued_reqs": 1, "max_num_seqs": 1})
    world.load()
    held = world.exchange("/v1/completions", {"prompt": "x"})
    first = await world.engine.next_request()
    response = await world.complete(prompt=["a", "b"], stream=stream)
    check_error(response, 429, reason="queue_full")
    assert len(world.engine.requests) == 2
    assert first.request_id not in world.engine.aborted
    await held.hang_up()
    assert sorted(world.engine.aborted) == sorted(request.request_id for request in world.engine.requests)
    assert world.engine.num_open_requests == 0


async def test_more_than_the_queue_can_ever_hold_is_refused(build_world, check_error):
    world = build_world(scheduler={"max_num_queued_reqs": 1, "max_num_seqs": 1})
    world.load()
    check_error(await world.complete(prompt=["a", "b"], n=2), 400, param="prompt")
    assert world.engine.requests == []
