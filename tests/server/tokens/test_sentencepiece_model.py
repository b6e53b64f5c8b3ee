import json
import struct
from pathlib import Path

import pytest

from quire_server.shared.errors import CheckpointError
from quire_server.tokens.tokenizer import load_tokenizer

UNKNOWN, CONTROL, USER_DEFINED, BYTE, NORMAL = 2, 3, 4, 6, 1


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    groups = []
    while True:
        groups.append(value & 127 | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(groups)


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_file(pieces: list[tuple[str, float, int]], model_type: int, *, add_dummy_prefix: bool = True) -> bytes:
    encoded = b"".join(
        field(1, field(1, piece.encode()) + field(2, score) + (field(3, kind) if kind != NORMAL else b""))
        for piece, score, kind in pieces
    )
    trainer = field(3, model_type) + field(40, 0) + field(41, 1) + field(42, 2) + field(43, -1)
    normalizer = field(1, b"identity") + field(3, int(add_dummy_prefix)) + field(4, 0)
    return encoded + field(2, trainer) + field(3, normalizer)


def bpe_pieces(directory: Path) -> list[tuple[str, float, int]]:
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    return [(token, -float(max(0, i - 259)), kind) for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))]


def test_bpe_gives_the_ids_of_the_json_file(byte_fallback_dir: Path, tmp_path: Path, nasty_texts: list[str]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file(bpe_pieces(byte_fallback_dir), 2))
    from_model, from_json = load_tokenizer(tmp_path), load_tokenizer(byte_fallback_dir)
    assert (from_model.bos_token, from_model.eos_token_ids) == ("<s>", (2,))
    for text in nasty_texts:
        if "<|im_" not in text:  # the configuration of the other adds these
            assert from_model.decode(from_model.encode(text)) == from_json.decode(from_json.encode(text)), text
    for text in ("Hello world", "The quick brown fox", "naïve 日本 \U0001f600", "two  spaces"):
        assert from_model.encode(text) == from_json.encode(text)


def test_the_configuration_decides_on_bos_and_eos(byte_fallback_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file(bpe_pieces(byte_fallback_dir), 2))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    token_ids = load_tokenizer(tmp_path).encode("Hello")
    assert (token_ids[0], token_ids[-1]) != (1, 2)
    assert token_ids[-1] == 2


def test_unigram_takes_the_most_likely_pieces(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<sep>", 0.0, USER_DEFINED)]
    pieces += [
        ("▁", -3.0, NORMAL),
        ("a", -2.0, NORMAL),
        ("b", -2.0, NORMAL),
        ("ab", -2.5, NORMAL),
        ("▁a", -4.5, NORMAL),
    ]
    (tmp_path / "tokenizer.model").write_bytes(model_file(pieces, 1))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab") == [1, 4, 7]
    assert tokenizer.encode("a<sep>", add_special_tokens=False) == [8, 3]
    assert tokenizer.decode([4, 7, 4, 5]) == "ab a"


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"\x0a\x7fcut", b'{"not": "protobuf"}'])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file([("a", 0.0, NORMAL)], 4))
    with pytest.raises(CheckpointError, match="model_type char"):
        load_tokenizer(tmp_path)
