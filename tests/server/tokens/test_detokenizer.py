"""Properties of incremental text: what was given, joined, is the text; nothing given is ever part of a stop string."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_server.tokens.detokenizer import BytesTextSource, Detokenizer, StopMatcher, WindowTextSource
from quire_server.tokens.tokenizer import load_tokenizer

BYTES = [bytes([i]) for i in range(256)]
WORDS = [b"a", b"b", b"ab", b"ba", b"aab", b" ", b"\xc3", b"\xa9", b"\xf0\x9f\x91", b"\x8d", b"<special>"]
SPECIAL = 10

word_ids = st.lists(st.integers(0, len(WORDS) - 1), max_size=30)
stop_strings = st.lists(st.text("ab é", min_size=1, max_size=5), min_size=1, max_size=3)


def deltas_of(detokenizer: Detokenizer, token_ids: list[int], size: int = 1) -> list[str]:
    deltas = []
    for start in range(0, len(token_ids), size):
        deltas.append(detokenizer.push(token_ids[start : start + size]))
        if detokenizer.stop is not None:
            break
    return [*deltas, detokenizer.finish()]


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """The specification: of all occurrences, the one that ends first; of those, the one that starts first."""
    ends = [(i + len(stop), i) for stop in stops for i in range(len(text)) if text.startswith(stop, i)]
    return (min(ends)[1], min(ends)[0]) if ends else None


@given(st.binary(max_size=60), st.integers(1, 7))
def test_joined_deltas_are_the_text(encoded: bytes, size: int) -> None:
    deltas = deltas_of(Detokenizer(BytesTextSource(BYTES)), list(encoded), size)
    assert "".join(deltas) == encoded.decode(errors="replace")


@given(st.text(max_size=30))
def test_a_character_is_never_split(text: str) -> None:
    deltas = deltas_of(Detokenizer(BytesTextSource(BYTES)), list(text.encode(errors="replace")))
    assert "\ufffd" not in "".join(deltas) or "\ufffd" in text
    assert "".join(deltas) == text.encode(errors="replace").decode()


@given(word_ids, stop_strings, st.integers(1, 4), st.booleans())
def test_text_ends_at_the_first_stop_string(ids: list[int], stops: list[str], size: int, include: bool) -> None:
    whole = b"".join(WORDS[i] for i in ids).decode(errors="replace")
    detokenizer = Detokenizer(BytesTextSource(WORDS), stops=stops, include_stop=include)
    text = "".join(deltas_of(detokenizer, ids, size))
    cut = first_stop(whole, stops)
    if cut is None:
        assert (text, detokenizer.stop) == (whole, None)
    else:
        assert text == whole[: cut[1] if include else cut[0]]
        assert detokenizer.stop == whole[cut[0] : cut[1]]


@given(word_ids, stop_strings)
def test_no_delta_ever_holds_part_of_a_stop_string_that_completes(ids: list[int], stops: list[str]) -> None:
    detokenizer = Detokenizer(BytesTextSource(WORDS), stops=stops)
    everything = Detokenizer(BytesTextSource(WORDS))
    given_text = known_text = ""
    for token_id in ids:
        given_text += detokenizer.push([token_id])
        known_text += everything.push([token_id])
        assert known_text.startswith(given_text)
        if detokenizer.stop is not None:
            break
        for stop in stops:
            beginnings = [k for k in range(1, len(stop)) if known_text.endswith(stop[:k])]
            assert len(given_text) <= len(known_text) - max(beginnings, default=0)
    assert all(stop not in given_text for stop in stops)


@given(word_ids, stop_strings, st.integers(0, 10))
def test_no_stop_string_completes_within_min_tokens(ids: list[int], stops: list[str], min_tokens: int) -> None:
    detokenizer = Detokenizer(BytesTextSource(WORDS), stops=stops, min_tokens=min_tokens)
    deltas_of(detokenizer, ids)
    assert detokenizer.stop is None or detokenizer.num_tokens > min(min_tokens, len(ids) - 1)


def test_tokens_after_the_stop_string_do_not_count() -> None:
    detokenizer = Detokenizer(BytesTextSource(WORDS), stops=["ab"])
    assert detokenizer.push([0, 1, 0, 1]) == ""
    assert detokenizer.num_tokens == 2


def test_text_is_held_no_longer_than_it_may_begin_a_stop_string() -> None:
    detokenizer = Detokenizer(BytesTextSource(BYTES), stops=["</answer>"])
    assert detokenizer.push(list(b"1 < 2 </")) == "1 < 2 "
    assert detokenizer.push(list(b"b")) == "</b"


def test_a_stop_string_that_overlaps_itself() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.push("aaa") is None
    assert matcher.num_held == 2
    match = matcher.push("b")
    assert match is not None
    assert (match.start, match.end) == (-2, 1)


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=12))
def test_any_other_decoder_streams_the_same_text(words: list[str]) -> None:
    def decode(token_ids: "list[int] | tuple[int, ...]") -> str:
        return " ".join(words[i] for i in token_ids)

    detokenizer = Detokenizer(WindowTextSource(decode))
    assert "".join(deltas_of(detokenizer, list(range(len(words))))) == " ".join(words)


@pytest.mark.parametrize("directory", ["byte_level_dir", "byte_fallback_dir"])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_real_tokenizers_stream_what_they_decode(
    request: pytest.FixtureRequest, nasty_texts: list[str], directory: str, skip_special_tokens: bool
) -> None:
    path: Path = request.getfixturevalue(directory)
    tokenizer = load_tokenizer(path)
    for text in nasty_texts:
        ids = tokenizer.encode(text)
        source = tokenizer.text_source(skip_special_tokens=skip_special_tokens)
        assert "".join(deltas_of(Detokenizer(source), ids)) == tokenizer.decode(ids, skip_special_tokens)


def test_an_answer_keeps_the_space_that_parts_it_from_the_prompt(byte_fallback_dir: Path) -> None:
    tokenizer = load_tokenizer(byte_fallback_dir)
    prompt, answer = tokenizer.encode("Hello"), tokenizer.encode("world", add_special_tokens=False)
    assert tokenizer.text_source(prompt).push(answer) == " world"
    assert tokenizer.text_source([1]).push(answer) == "world"  # after BOS alone it is the beginning of the text


@given(st.lists(st.integers(0, 11), max_size=12))
def test_ids_beyond_the_vocabulary_are_no_text(ids: list[int]) -> None:
    known = [i for i in ids if i < len(WORDS)]
    text = b"".join(WORDS[i] for i in known if i != SPECIAL).decode(errors="replace")
    source = BytesTextSource(WORDS, skipped_ids=frozenset({SPECIAL}))
    assert source.push(ids) + source.flush() == text
