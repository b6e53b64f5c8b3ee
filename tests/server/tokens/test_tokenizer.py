import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Backend

from quire_server.shared.errors import CheckpointError, ContextLengthError, InvalidRequestError
from quire_server.tokens.tokenizer import Tokenizer, load_tokenizer


def reference_tokenizer(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="session", params=["byte_level_dir", "byte_fallback_dir"])
def directory(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="session")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def reference(directory: Path) -> Any:
    return reference_tokenizer(directory)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_as_transformers(
    tokenizer: Tokenizer, reference: Any, nasty_texts: list[str], add_special_tokens: bool
) -> None:
    for text in nasty_texts:
        expected = reference.encode(text, add_special_tokens=add_special_tokens)
        assert tokenizer.encode(text, add_special_tokens=add_special_tokens) == expected, text


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decodes_as_transformers(
    tokenizer: Tokenizer, reference: Any, nasty_texts: list[str], skip_special_tokens: bool
) -> None:
    for text in nasty_texts:
        token_ids = reference.encode(text)
        expected = reference.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens) == expected, text


def test_special_tokens_agree_with_transformers(tokenizer: Tokenizer, reference: Any) -> None:
    special = {token_id for token_id, token in reference.added_tokens_decoder.items() if token.special}
    assert tokenizer.special_token_ids == special
    assert tokenizer.bos_token == reference.bos_token
    assert tokenizer.eos_token_ids == (reference.eos_token_id,)
    assert tokenizer.vocab_size == len(reference)


@pytest.mark.parametrize("bos", [True, False])
def test_the_json_files_rule_for_bos_wins_over_the_configuration(
    byte_level_dir: Path, tmp_path: Path, bos: bool
) -> None:
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": bos}))
    token_ids = load_tokenizer(tmp_path).encode("Hello")
    assert token_ids == reference_tokenizer(tmp_path).encode("Hello")
    assert token_ids[0] == 0


def test_token_bytes_are_exact_and_text_marks_what_is_not_whole(byte_level_dir: Path) -> None:
    tokenizer = load_tokenizer(byte_level_dir)
    token_ids = tokenizer.encode("\U00010348", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == "\U00010348".encode()
    assert "\ufffd" in tokenizer.token_text(token_ids[0])
    assert tokenizer.token_text(tokenizer.encode("Hello", add_special_tokens=False)[0]) == "Hello"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([10**6, -1]) == ""


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": [3, 1]}, {"eos_token_id": 0}, (3, 1)),
        ({"eos_token_id": 1}, {}, (3, 1)),
        ({}, {"eos_token_id": 2}, (3, 2)),
        ({"temperature": 0.6}, {}, (3,)),
    ],
)
def test_eos_is_the_union_of_tokenizer_and_generation_config(
    byte_level_dir: Path, tmp_path: Path, generation: dict[str, Any], model: dict[str, Any], expected: tuple[int, ...]
) -> None:
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert load_tokenizer(tmp_path).eos_token_ids == expected


def test_vocab_and_merges_files_are_the_same_tokenizer(
    byte_level_dir: Path, tmp_path: Path, nasty_texts: list[str]
) -> None:
    state = json.loads((byte_level_dir / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    from_files, from_json = load_tokenizer(tmp_path), load_tokenizer(byte_level_dir)
    for text in nasty_texts:
        assert from_files.encode(text) == from_json.encode(text)
        assert from_files.decode(from_files.encode(text)) == from_json.decode(from_json.encode(text))


def test_another_tokenizer_keeps_the_models_generation_config(
    byte_level_dir: Path, byte_fallback_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    tokenizer = load_tokenizer(tmp_path, byte_level_dir)
    assert tokenizer.eos_token_ids == (3, 7)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "--tokenizer" in caught.value.termination.hint


@pytest.mark.parametrize("text", ['{"cut": ', "[" * 100_000 + "]" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_broken_file_is_named(byte_level_dir: Path, tmp_path: Path, name: str, text: str) -> None:
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_the_clients_fault(byte_level_dir: Path) -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        load_tokenizer(byte_level_dir).encode("\ud83d")


def test_a_decoder_that_looks_at_neighbours_still_streams(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = {"[UNK]": 0, "hello": 1, "##ing": 2, "##s": 3, "world": 4}
    backend = Backend(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    source = tokenizer.text_source([1])
    pieces = [source.push([token_id]) for token_id in (2, 4, 3)] + [source.flush()]
    assert pieces == ["ing", " world", "s", ""]
    assert tokenizer.decode([1, 2, 4, 3]) == "helloing worlds"


@pytest.mark.parametrize(
    ("normalizer", "factor"),
    [
        (None, 1),
        (normalizers.Replace(" ", "▁"), 1),
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.NFKC()]), 4),
        (normalizers.Replace(" ", ""), None),
        (normalizers.Replace(Regex(" +"), " "), None),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]), None),
    ],
)
def test_the_longest_text_of_one_token(
    byte_level_dir: Path, tmp_path: Path, normalizer: Any, factor: int | None
) -> None:
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    longest = max(len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size))
    assert tokenizer.max_bytes_per_token == (factor and factor * longest)


def test_no_text_has_fewer_tokens_than_the_longest_one_allows(tokenizer: Tokenizer, nasty_texts: list[str]) -> None:
    assert tokenizer.max_bytes_per_token is not None
    for text in [*nasty_texts, *(text * 50 for text in nasty_texts), "e\u0301" * 99, "𝐀" * 99, " " * 999]:
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
        assert len(text.encode()) <= num_tokens * tokenizer.max_bytes_per_token, text


def test_too_many_tokens_are_not_listed(tokenizer: Tokenizer) -> None:
    text = "Hello, world! " * 100
    num_tokens = len(tokenizer.encode(text))
    assert len(tokenizer.encode(text, max_tokens=num_tokens)) == num_tokens
    with pytest.raises(ContextLengthError, match=f"{num_tokens} tokens"):
        tokenizer.encode(text, max_tokens=num_tokens - 1)
