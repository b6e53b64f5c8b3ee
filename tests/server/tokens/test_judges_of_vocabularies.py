"""Token ids against llama.cpp's own vocabularies with expected ids, and its source's table of pre-tokenizers."""

import ast
import re
from pathlib import Path

import judges
import pytest
from tokenizers import Regex, pre_tokenizers

from quire_server.shared.errors import CheckpointError
from quire_server.tokens.pre_tokenizers import NOT_SERVED, splits_for
from quire_server.tokens.tokenizer import load_tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"
SOURCE = "llama.cpp/src/llama-vocab.cpp"
VOCABULARIES = [name for name in judges.names("llama.cpp/models/*.gguf") if "bert" not in name]
OWN_ENGINE = ("afmoe", "kimi-k2", "tekken")
"""llama.cpp has code instead of an expression for these, or one that its own engine makes do with."""
MORE_TEXTS = [
    "12345678 x1234y 1,234,567.891",
    "HelloWorld HTTPServer iPhone's 你好世界abc 漢字かな",
    "Привет, МИР! don'T ไทย ພາສາ 한국어ㄱ！…",
    "  \n \n a\n\n  b\r\n \t\tx_y-z/=+$<>^|~`",
]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(judges.unpack(name, tmp_path))
    texts = judges.read(f"{name}.inp").decode().split(SEPARATOR)
    expected = [[int(number) for number in line.split()] for line in judges.read(f"{name}.out").decode().splitlines()]
    assert len(texts) - len(expected) in (0, 1)  # the last one may be empty
    assert len(expected) > 40
    for text, token_ids in zip(texts, expected, strict=False):
        assert tokenizer.encode(text, add_special_tokens=False) == token_ids, text


def test_a_vocabulary_of_an_embedding_model_is_refused_by_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="of kind 'bert'; gpt2, llama are supported"):
        load_tokenizer(judges.unpack("llama.cpp/models/ggml-vocab-bert-bge.gguf", tmp_path))


def pre_tokenizer_kinds(source: str) -> dict[str, tuple[str, bool, bool]]:
    """By name: the kind, whether whole tokens go unmerged, whether BOS comes first."""
    kinds = {}
    for condition, body in re.findall(r'((?:tokenizer_pre == "[^"]+"[\s|]*)+)\)\s*\{(.*?)\}', source, re.DOTALL):
        if kind := re.search(r"PRE_TYPE_(\w+)", body):
            for name in re.findall(r'"([^"]+)"', condition):
                kinds[name] = (kind[1], "ignore_merges = true" in body, "add_bos = true" in body)
    return kinds


def expressions_by_kind(source: str) -> dict[str, list[str]]:
    """What each kind cuts by: the published model's expressions where a comment keeps all, the code's otherwise."""
    table = source[source.index("switch (vocab.get_pre_type())") :]
    blocks = re.findall(
        r"((?:(?:case LLAMA_VOCAB_PRE_TYPE_\w+|default):\s*(?://[^\n]*\n\s*)*)+)regex_exprs = \{(.*?)\n\s*\};",
        table,
        re.DOTALL,
    )
    expressions = {}
    for labels, body in blocks:
        lines = re.findall(r'^\s*(// ?)?("(?:[^"\\]|\\.)*"),?', body, re.MULTILINE)
        original = [ast.literal_eval(text) for comment, text in lines if comment]
        written = [ast.literal_eval(text) for comment, text in lines if not comment]
        for kind in re.findall(r"PRE_TYPE_(\w+)", labels) or ["DEFAULT"]:
            expressions[kind] = original if len(original) == len(written) else written
    return expressions


def cut(splits: tuple[str, ...] | list[str], text: str) -> list[str]:
    steps = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    return [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


def test_every_pre_tokenizer_of_llama_cpp_cuts_as_there_or_is_refused(nasty_texts: list[str]) -> None:
    source = judges.read(SOURCE).decode()
    kinds, expressions = pre_tokenizer_kinds(source), expressions_by_kind(source)
    assert len(kinds) > 80
    assert set(NOT_SERVED) <= set(kinds)
    for name in kinds.keys() - NOT_SERVED.keys():
        kind, ignore_merges, adds_bos = kinds[name]
        pre_tokenizer = splits_for(name)
        assert (pre_tokenizer.ignore_merges, pre_tokenizer.adds_bos) == (ignore_merges, adds_bos), name
        for text in [*nasty_texts, *MORE_TEXTS] if name not in OWN_ENGINE else []:
            assert cut(pre_tokenizer.splits, text) == cut(expressions[kind], text), (name, text)


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
def test_names_that_are_not_served_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}'.*is not supported: {NOT_SERVED[name]}"):
        splits_for(name)


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("kimi-k2", "HelloWorld你好abc 12345", ["Hello", "World", "你好", "abc", " ", "123", "45"]),
        ("tekken", "naïve e\u0301 HTTPServer 12", ["naïve", " e\u0301", " HTTPServer", " ", "1", "2"]),
        ("afmoe", "a 1234567 b12", ["a", " ", "1", "234", "567", " b", "12"]),
    ],
)
def test_pre_tokenizers_that_llama_cpp_has_in_code(name: str, text: str, pieces: list[str]) -> None:
    """Expected pieces follow the expressions in its comments."""
    assert cut(splits_for(name).splits, text) == pieces
