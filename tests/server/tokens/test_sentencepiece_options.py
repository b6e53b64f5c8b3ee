"""The options of a `tokenizer.model`, against the `sentencepiece` package that defines them."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from quire_server.shared.errors import CheckpointError
from quire_server.tokens.tokenizer import load_tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. Don't you think it's 1234567890 times faster?",
    "Ünïcödé thé naïve café, München, Ελληνικά, русский язык, 日本語, 中文, 한국어",
    "👍🏽 emoji and more emoji 🎉🎉🎉 <sep> and Ｆｕｌｌ　ｗｉｄｔｈ",
    "Hello Hello Hello world world the the the and and of of to to in in",
] * 6
SPACED_TEXTS = [
    "   ",
    "  lead",
    "trail  ",
    "a  b   c",
    "\ttab\there",
    "\n\n a\n  b\r\n\r\nc",
    "　full　width　",
    "Ｈｅｌｌｏ　１２",
    "😀 😀  😀",
    " 😀",
    "a\u00a0b",
    "ﬁ ﬃ ① e\u0301",
    "\u200b zero",
    "▁x ▁",
    "hello <sep>  world<sep>",
    "<sep>a",
]


def train(**options: Any) -> bytes:
    written = io.BytesIO()
    defaults = {"vocab_size": 420, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=written, **{**defaults, **options}
    )
    return written.getvalue()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"remove_extra_whitespaces": False},
    {"add_dummy_prefix": False},
    {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    {"normalization_rule_name": "identity"},
    {"normalization_rule_name": "nfkc_cf"},
    {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True},
    {"byte_fallback": True},
    {"user_defined_symbols": ["<sep>", "an", "a"], "remove_extra_whitespaces": False},
    {"user_defined_symbols": ["<sep>"], "byte_fallback": True},
]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("options", OPTIONS)
def test_ids_and_texts_are_those_of_sentencepiece(
    tmp_path: Path, nasty_texts: list[str], model_type: str, options: dict[str, Any]
) -> None:
    model = train(model_type=model_type, **options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer, judge = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in [*nasty_texts, *SPACED_TEXTS]:
        if "<s>" in text or "</s>" in text:
            continue  # control tokens: text to the judge, tokens to a server
        expected = judge.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        if judge.unk_id() not in expected and not text.startswith("▁"):  # the judge drops that mark, as if a space
            assert tokenizer.decode(expected) == judge.decode(expected), text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "word"}, "model_type word"),
        ({"model_type": "char"}, "model_type char"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"denormalization_rule_tsv": "rules.tsv"}, "a denormalizer"),
    ],
)
def test_options_that_are_not_served_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rules.tsv").write_text("41\t42\n")
    (tmp_path / "tokenizer.model").write_bytes(train(**options))
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model: .*{named} is not supported") as refused:
        load_tokenizer(tmp_path)
    assert "--tokenizer" in refused.value.termination.hint


def test_unescaped_spaces_are_refused(tmp_path: Path) -> None:
    normalizer_without_escapes = b"\x1a\x02\x28\x00"  # no option of the trainer, but one of the format
    (tmp_path / "tokenizer.model").write_bytes(train() + normalizer_without_escapes)
    with pytest.raises(CheckpointError, match="escape_whitespaces off"):
        load_tokenizer(tmp_path)
