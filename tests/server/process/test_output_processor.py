import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from quire_server.engine.output import EngineCoreOutput, TokenLogprobs
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.frontend.output_processor import MIN_LOGPROB, CompletionDelta, OutputProcessor
from quire_server.shared.errors import ContextLengthError
from quire_server.tokens.tokenizer import Tokenizer, load_tokenizer

EOS = 256
MakeRequest = Callable[..., EngineRequest]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Each token is one byte, in the order of the byte alphabet; EOS follows."""
    from quire_server.tokens.token_bytes import byte_alphabet

    path: Path = tmp_path_factory.mktemp("bytes")
    backend = Backend(models.BPE({char: byte for byte, char in byte_alphabet().items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return load_tokenizer(path)


def output_of(
    text: str = "", *, token_ids: list[int] | None = None, finish_reason: FinishReason | None = None, **fields: object
) -> EngineCoreOutput:
    ids = list(text.encode()) if token_ids is None else token_ids
    return EngineCoreOutput(request_id="r", new_token_ids=ids, finish_reason=finish_reason, **fields)  # type: ignore[arg-type]


def text_of(deltas: list[CompletionDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_a_stop_string_ends_the_answer_before_the_engine_does(tokenizer: Tokenizer, make_request: MakeRequest) -> None:
    processor = OutputProcessor(tokenizer, make_request("r", stop=("END",)))
    deltas = [processor.process(output_of("Hi E")), processor.process(output_of("NDless", num_cached_tokens=2))]
    assert [delta.text for delta in deltas] == ["Hi ", ""]
    last = deltas[-1]
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "END")
    assert last.token_ids == list(b"ND")  # what came after in the same step does not count
    assert last.num_output_tokens == 6
    assert last.num_cached_tokens == 2
    assert processor.is_finished


def test_a_stop_string_wins_over_the_engines_own_end(tokenizer: Tokenizer, make_request: MakeRequest) -> None:
    processor = OutputProcessor(tokenizer, make_request("r", stop=("b",)))
    delta = processor.process(output_of("abc", finish_reason=FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", FinishReason.STOP, "b")


def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer, make_request: MakeRequest) -> None:
    processor = OutputProcessor(tokenizer, make_request("r", stop=("END",)))
    deltas = [processor.process(output_of("Hi EN")), processor.process(output_of(finish_reason=FinishReason.LENGTH))]
    assert [delta.text for delta in deltas] == ["Hi ", "EN"]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.LENGTH, None)


def test_an_incomplete_character_comes_at_the_end(tokenizer: Tokenizer, make_request: MakeRequest) -> None:
    processor = OutputProcessor(tokenizer, make_request("r"))
    deltas = [processor.process(output_of(token_ids=[0xE2, 0x82]))]
    deltas.append(processor.process(output_of(token_ids=[], finish_reason=FinishReason.LENGTH)))
    assert [delta.text for delta in deltas] == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("include", "skip_special", "last_token", "stop_reason", "expected"),
    [
        (False, True, EOS, None, "Hi"),
        (False, False, EOS, None, "Hi"),
        (True, False, EOS, None, "Hi</s>"),
        (True, True, EOS, None, "Hi"),
        (False, True, ord("!"), 33, "Hi"),
        (True, True, ord("!"), 33, "Hi!"),
    ],
)
def test_the_token_that_ended_it_is_text_only_if_asked_for(
    tokenizer: Tokenizer,
    make_request: MakeRequest,
    include: bool,
    skip_special: bool,
    last_token: int,
    stop_reason: int | None,
    expected: str,
) -> None:
    params = {"include_stop_str_in_output": include, "skip_special_tokens": skip_special, "stop": ("never",)}
    processor = OutputProcessor(tokenizer, make_request("r", **params))
    ids = [*b"Hi", last_token]
    delta = processor.process(output_of(token_ids=ids, finish_reason=FinishReason.STOP, stop_reason=stop_reason))
    assert (delta.text, delta.stop_reason) == (expected, stop_reason)
    assert delta.token_ids == ids
    assert delta.num_output_tokens == 3


def test_logprobs_carry_texts_and_bytes(tokenizer: Tokenizer, make_request: MakeRequest) -> None:
    processor = OutputProcessor(tokenizer, make_request("r", logprobs=2, stop=("b",)))
    positions = [
        TokenLogprobs(token_id=ord("a"), logprob=-0.5, rank=2, top=[(ord("z"), -0.1), (0xE2, float("-inf"))]),
        TokenLogprobs(token_id=ord("b"), logprob=-1.0, rank=1),
        TokenLogprobs(token_id=ord("c"), logprob=-1.0, rank=1),
    ]
    delta = processor.process(output_of("abc", logprobs=positions, prompt_logprobs=positions[:1]))
    assert [position.chosen.token for position in delta.logprobs] == ["a", "b"]
    first = delta.logprobs[0]
    assert (first.chosen.bytes, first.chosen.rank, first.chosen.logprob) == (b"a", 2, -0.5)
    assert [(entry.token, entry.bytes, entry.logprob, entry.rank) for entry in first.top] == [
        ("z", b"z", -0.1, 1),
        ("\ufffd", b"\xe2", MIN_LOGPROB, 2),
    ]
    assert delta.prompt_logprobs == [first]


def test_without_detokenization_there_are_ids_alone(tokenizer: Tokenizer, make_request: MakeRequest) -> None:
    processor = OutputProcessor(tokenizer, make_request("r", detokenize=False, stop=("a",)))
    delta = processor.process(output_of("abc", finish_reason=FinishReason.STOP))
    assert (delta.text, delta.token_ids, delta.num_output_tokens) == ("", list(b"abc"), 3)


def test_an_error_is_passed_on(tokenizer: Tokenizer, make_request: MakeRequest) -> None:
    processor = OutputProcessor(tokenizer, make_request("r"))
    delta = processor.process(EngineCoreOutput.failed("r", ContextLengthError("no room", "prompt")))
    assert delta.finish_reason is FinishReason.ERROR
    assert isinstance(delta.error, ContextLengthError)
    assert (str(delta.error), delta.error.param) == ("no room", "prompt")
    assert processor.is_finished


def test_each_branch_has_a_text_of_its_own(tokenizer: Tokenizer, make_request: MakeRequest) -> None:
    processor = OutputProcessor(tokenizer, make_request("r", num_branches=2, stop=("END",)))
    deltas = [
        processor.process(output_of("one E", branch=0)),
        processor.process(output_of("two EN", branch=1)),
        processor.process(output_of("ND", branch=0)),
    ]
    assert [(delta.branch, delta.text) for delta in deltas] == [(0, "one "), (1, "two "), (0, "")]
    assert (deltas[2].finish_reason, deltas[2].stop_reason, deltas[2].num_output_tokens) == (
        FinishReason.STOP,
        "END",
        7,
    )
    assert not processor.is_finished
    last = processor.process(output_of("G", branch=1, finish_reason=FinishReason.LENGTH))
    assert (last.branch, last.text, last.finish_reason, last.num_output_tokens) == (1, "ENG", FinishReason.LENGTH, 7)
    assert processor.is_finished


def test_an_error_ends_every_branch(tokenizer: Tokenizer, make_request: MakeRequest) -> None:
    processor = OutputProcessor(tokenizer, make_request("r", num_branches=3))
    processor.process(output_of("x", branch=0, finish_reason=FinishReason.LENGTH))
    delta = processor.process(EngineCoreOutput.failed("r", ContextLengthError("no room", "prompt")))
    assert delta.finish_reason is FinishReason.ERROR
    assert processor.is_finished
