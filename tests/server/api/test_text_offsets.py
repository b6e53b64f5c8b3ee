"""Where tokens begin in the text of a completion, and which token of a position comes first."""

import pytest

from quire_server.api.openai.logprobs import TextOffsets, build_completion_logprobs, build_prompt_logprobs
from quire_server.engine.output import EngineCoreOutput, TokenLogprobs
from quire_server.engine.request import FinishReason
from quire_server.frontend.output_processor import LogprobEntry, PositionLogprobs

pytestmark = pytest.mark.anyio


def entry(token_id, token, logprob=-1.0, rank=1):
    raw = token if isinstance(token, bytes) else token.encode()
    return LogprobEntry(token_id, raw.decode(errors="replace"), raw, logprob, rank)


def positions(*tokens):
    return [PositionLogprobs(entry(token_id, token), ()) for token_id, token in enumerate(tokens, start=100)]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["Hello", ",", " world", "!"], [0, 5, 6, 12]),
        (["abc", " de", "!"], [0, 3, 6]),
        (["n", b"\xc3", b"\xa9", "e"], [0, 1, 1, 2]),
        (["a", b"\xf0\x9f", b"\x98\x80!", "b"], [0, 1, 1, 3]),
        (["\U0001f600", "b"], [0, 1]),
        ([b"\xff", "b"], [0, 1]),
    ],
)
def test_offsets_are_places_in_the_text_however_tokens_are_named(tokens, expected, as_ids):
    """Of a character that several tokens make, vLLM decodes all but the last to nothing: all begin where it does."""
    whole = positions(*tokens)
    for first, rest in ((None, whole), (whole[0].chosen, whole[1:])):
        built = build_completion_logprobs(rest, first_token=first, offsets=TextOffsets(), as_ids=as_ids)
        assert built.text_offset == expected
    offsets = TextOffsets()
    in_pieces = [build_completion_logprobs([item], first_token=None, offsets=offsets, as_ids=as_ids) for item in whole]
    assert [built.text_offset for built in in_pieces] == [[offset] for offset in expected]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_offsets_with_echo(world, parse_events, stream, as_ids):
    ids = world.tokenizer.encode("héxy")

    def position(token_id):
        return TokenLogprobs(token_id, -1.0, 1, [(token_id, -1.0)])

    world.engine.script = lambda request: [
        EngineCoreOutput(request_id=request.request_id, prompt_logprobs=[position(item) for item in ids[1:3]]),
        EngineCoreOutput(request_id=request.request_id, new_token_ids=ids[3:4], logprobs=[position(ids[3])]),
        EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=ids[4:],
            logprobs=[position(ids[4])],
            finish_reason=FinishReason.LENGTH,
        ),
    ]
    response = await world.complete(
        prompt="hé", echo=True, logprobs=0, return_tokens_as_token_ids=as_ids, stream=stream
    )
    bodies = parse_events(response.text) if stream else [response.json()]
    shown = [body["choices"][0]["logprobs"] for body in bodies]
    assert [offset for logprobs in shown for offset in logprobs["text_offset"]] == [0, 1, 1, 2, 3]
    names = [f"token_id:{token_id}" for token_id in ids] if as_ids else ["h", "bytes:\\xc3", "bytes:\\xa9", "x", "y"]
    assert [token for logprobs in shown for token in logprobs["tokens"]] == names


def test_the_token_that_is_there_comes_first_and_has_its_own_rank():
    """As vLLM's `create_prompt_logprobs`: the prompt's token, then the most likely ones."""
    top = (entry(7, "a", -0.1, 1), entry(8, "b", -0.2, 2))
    for chosen, order in ((entry(9, "c", -5.0, 33), [9, 7, 8]), (entry(8, "b", -0.2, 2), [8, 7])):
        position = PositionLogprobs(chosen, top)
        _, shown = build_prompt_logprobs([position])
        assert list(shown) == order
        assert [shown[token_id].rank for token_id in order] == [
            chosen.rank,
            *(rank for rank in (1, 2) if rank != chosen.rank),
        ]
        built = build_completion_logprobs([position], first_token=None, offsets=TextOffsets(), as_ids=True)
        assert list(built.top_logprobs[0]) == [f"token_id:{token_id}" for token_id in order]
