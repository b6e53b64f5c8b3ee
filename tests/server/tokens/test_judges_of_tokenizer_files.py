"""The tokenizers of five families as their makers publish them, against `transformers`."""

from pathlib import Path
from typing import Any

import judges
import pytest

from quire_server.tokens.tokenizer import Tokenizer, load_tokenizer

FAMILIES = ("deepseek_v3", "gemma3", "gptoss", "llama3_1", "qwen3")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def directory(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(family)
    for name in judges.names(f"tokenizer-{family}/*"):
        judges.unpack(name, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def judge(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def test_ids_and_texts_are_those_of_transformers(tokenizer: Tokenizer, judge: Any, nasty_texts: list[str]) -> None:
    for text in nasty_texts:
        token_ids = judge.encode(text)
        assert tokenizer.encode(text) == token_ids, text
        for skip in (True, False):
            expected = judge.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(token_ids, skip_special_tokens=skip) == expected, text


def test_a_text_that_comes_token_by_token_is_the_whole_text(
    tokenizer: Tokenizer, judge: Any, nasty_texts: list[str]
) -> None:
    for text in nasty_texts:
        token_ids = judge.encode(text, add_special_tokens=False)
        source = tokenizer.text_source()
        pieces = [source.push([token_id]) for token_id in token_ids] + [source.flush()]
        assert "".join(pieces) == tokenizer.decode(token_ids), text


def test_special_tokens_are_those_of_transformers(tokenizer: Tokenizer, judge: Any) -> None:
    special = {token_id for token_id, token in judge.added_tokens_decoder.items() if token.special}
    assert tokenizer.special_token_ids == special
    assert (tokenizer.bos_token, tokenizer.eos_token) == (judge.bos_token, judge.eos_token)
