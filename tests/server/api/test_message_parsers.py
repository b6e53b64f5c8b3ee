"""Chat answers, streamed and whole, are made of what a parser of messages returns, whatever that is."""

import pytest
from call_parser import CallParser

from quire_server.api.openai import chat
from quire_server.engine.output import EngineCoreOutput, TokenLogprobs
from quire_server.engine.request import FinishReason

pytestmark = pytest.mark.anyio


@pytest.fixture
def parsers(monkeypatch):
    """Every parser that is built, by request."""
    built = []

    def build(request):
        built.append([CallParser() for _ in request.choice_to_prompt])
        return built[-1]

    monkeypatch.setattr(chat, "build_parsers", build)
    return built


def _by_choice(chunks, n):
    contents, reasons = [""] * n, [[] for _ in range(n)]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        contents[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"] is not None:
            reasons[choice["index"]].append(choice["finish_reason"])
    return contents, reasons


async def test_streamed_and_whole_are_what_the_parsers_make_of_each_choice(world, parse_events, parsers):
    pieces = [["I call.<ca", "ll", ">Do", "ne <cal"], ["no", " calls<", "c"]]
    turns = iter([0, 1, 0, 1])

    def script(request):
        outputs = [world.engine.output(request, piece) for piece in pieces[next(turns)]]
        return [*outputs, world.engine.output(request, finish_reason=FinishReason.LENGTH)]

    world.engine.script = script
    whole = (await world.chat(n=2)).json()["choices"]
    expected = ["I call.Done <cal", "no calls<c"]
    assert [choice["message"]["content"] for choice in whole] == expected
    assert [choice["finish_reason"] for choice in whole] == ["tool_calls", "length"]
    contents, reasons = _by_choice(parse_events((await world.chat(n=2, stream=True)).text), 2)
    assert (contents, reasons) == (expected, [["tool_calls"], ["length"]])
    assert [len(each) for each in parsers] == [2, 2]
    assert parsers[0][0].token_ids == world.tokenizer.encode("".join(pieces[0]))


async def test_text_that_is_held_back_makes_no_event_of_its_own(world, parse_events, parsers):
    world.engine.answer("a", "<ca", "ll>", "b")
    chunks = parse_events((await world.chat(stream=True)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]


async def test_an_end_without_text_has_an_empty_delta(world, parse_events):
    world.engine.answer("a", "")
    chunks = parse_events((await world.chat(stream=True)).text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:]] == [{"content": "a"}, {}]


@pytest.mark.parametrize("has_ids", [True, False])
async def test_log_probabilities_come_with_their_tokens_though_the_text_is_held_back(
    world, parse_events, parsers, has_ids
):
    ids = world.tokenizer.encode("<b")
    world.engine.script = lambda request: [
        EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[token_id],
            logprobs=[TokenLogprobs(token_id, -1.0, 1, [])],
            finish_reason=FinishReason.LENGTH if token_id == ids[-1] else None,
        )
        for token_id in ids
    ]
    chunks = parse_events((await world.chat(stream=True, logprobs=True, return_token_ids=has_ids)).text)
    choices = [chunk["choices"][0] for chunk in chunks[1:]]
    assert [choice["delta"] for choice in choices] == [{"content": ""}, {"content": "<b"}]
    assert [choice["logprobs"]["content"][0]["token"] for choice in choices] == ["<", "b"]
    assert [choice.get("token_ids") for choice in choices] == ([[ids[0]], [ids[1]]] if has_ids else [None, None])
