"""SentencePiece's own file, `tokenizer.model`, for checkpoints that ship no `tokenizer.json`.

Reads the few fields that matter straight from the protobuf wire format.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from quire_server.shared.errors import CheckpointError
from quire_server.tokens.backends import TokenizerParts, add_bos_eos, build_byte_fallback, merges_from_scores

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

Value = int | bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What the file says, as far as it is used."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    model_type: int
    add_dummy_prefix: bool
    charsmap: bytes
    unk_id: int
    bos_id: int
    eos_id: int


def read_sentencepiece(path: Path) -> TokenizerParts:
    """Read a `tokenizer.model`. BOS comes before a text unless a configuration says otherwise.

    Raises:
        CheckpointError: it is no SentencePiece model, or of a kind other than BPE and unigram.
    """
    try:
        model = parse_sentencepiece(path.read_bytes())
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}.") from error
    if model.model_type == _BPE:
        backend = _build_bpe(model)
    elif model.model_type == _UNIGRAM:
        backend = _build_unigram(model)
    else:
        raise CheckpointError(f"{path}: SentencePiece models of type {model.model_type} are not supported.")
    if model.charsmap:
        backend.normalizer = normalizers.Sequence([normalizers.Precompiled(model.charsmap), backend.normalizer])
    _add_special_tokens(backend, model)
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    special_tokens = {name: model.tokens[i] for name, i in named.items() if 0 <= i < len(model.tokens)}
    add_bos_eos(backend, special_tokens.get("bos_token"), None)
    return TokenizerParts(backend=backend, special_tokens=special_tokens)


def parse_sentencepiece(encoded: bytes) -> SentencePieceModel:
    """Decode the protobuf. Raises ValueError or struct.error where it is none."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(encoded):
        if number == 1:
            pieces.append(_parse_piece(_as_bytes(value)))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SentencePieceModel(
        tokens=[piece for piece, _, _ in pieces],
        scores=[score for _, score, _ in pieces],
        types=[kind for _, _, kind in pieces],
        model_type=_as_int(trainer.get(3, _UNIGRAM)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        charsmap=_as_bytes(normalizer.get(2, b"")),
        unk_id=_as_int(trainer.get(40, 0)),
        bos_id=_as_int(trainer.get(41, 1)),
        eos_id=_as_int(trainer.get(42, 2)),
    )


def _parse_piece(encoded: bytes) -> tuple[str, float, int]:
    values = dict(_fields(encoded))
    score = struct.unpack("<f", struct.pack("<I", _as_int(values.get(2, 0))))[0]
    return _as_bytes(values.get(1, b"")).decode(), score, _as_int(values.get(3, _NORMAL))


def _fields(encoded: bytes) -> Iterator[tuple[int, Value]]:
    """Yield (field number, value); numbers as they are, strings and messages as bytes."""
    position = 0
    while position < len(encoded):
        key, position = _varint(encoded, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(encoded, position)
            yield number, value - (1 << 64) if value >> 63 else value
        elif wire_type == _BYTES:
            size, position = _varint(encoded, position)
            if position + size > len(encoded):
                raise ValueError("it is cut short")
            yield number, encoded[position : position + size]
            position += size
        elif wire_type in (_FIXED32, _FIXED64):
            layout = "<I" if wire_type == _FIXED32 else "<Q"
            yield number, struct.unpack_from(layout, encoded, position)[0]
            position += struct.calcsize(layout)
        else:
            raise ValueError(f"unknown wire type {wire_type}")


def _varint(encoded: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(encoded) or shift > 63:
            raise ValueError("it is cut short")
        byte = encoded[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def _as_int(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a number is not a number")
    return value


def _as_bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a string is not a string")
    return value


def _build_bpe(model: SentencePieceModel) -> Backend:
    is_piece = [kind not in (_CONTROL, _UNKNOWN) for kind in model.types]
    return build_byte_fallback(
        {token: token_id for token_id, token in enumerate(model.tokens)},
        merges_from_scores(model.tokens, model.scores, is_piece),
        unknown_token=model.tokens[model.unk_id],
        add_space_prefix=model.add_dummy_prefix,
    )


def _build_unigram(model: SentencePieceModel) -> Backend:
    backend = build_byte_fallback({}, [], unknown_token=None, add_space_prefix=model.add_dummy_prefix)
    pieces = list(zip(model.tokens, model.scores, strict=True))
    backend.model = models.Unigram(pieces, unk_id=model.unk_id, byte_fallback="<0x00>" in model.tokens)
    if "<0x00>" not in model.tokens:
        steps: list[object] = [decoders.Replace("▁", " "), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else steps)
    return backend


def _add_special_tokens(backend: Backend, model: SentencePieceModel) -> None:
    pairs = list(zip(model.tokens, model.types, strict=True))
    special = [token for token, kind in pairs if kind in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    user_defined = [token for token, kind in pairs if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])
