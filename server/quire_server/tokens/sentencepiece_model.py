"""SentencePiece's own file, `tokenizer.model`, for checkpoints that ship no `tokenizer.json`.

Reads the few fields that matter straight from the protobuf wire format.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from quire_server.shared.errors import CheckpointError
from quire_server.tokens.backends import TokenizerParts, add_bos_eos, build_byte_fallback, merges_from_scores

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_INSIDE_A_BYTE = r"(?<=<0x)(?=[0-9A-F]{2}>)"

Value = int | bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What the file says, as far as it is used."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    model_type: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes
    unserved: tuple[str, ...]
    """Options that are set and that no backend here follows, by their names in the format."""
    unk_id: int
    bos_id: int
    eos_id: int


def read_sentencepiece(path: Path) -> TokenizerParts:
    """Read a `tokenizer.model`. BOS comes before a text unless a configuration says otherwise.

    Raises:
        CheckpointError: it is no SentencePiece model, or one with a type or options that are not served; names them.
    """
    try:
        model = parse_sentencepiece(path.read_bytes())
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}.") from error
    if model.unserved:
        raise CheckpointError(
            f"{path}: a SentencePiece model with {', '.join(model.unserved)} is not supported.",
            hint="Ship the model's tokenizer.json, or name its directory with --tokenizer.",
        )
    backend = _build_bpe(model) if model.model_type == _BPE else _build_unigram(model)
    backend.normalizer = normalizers.Sequence([*_normalizer_steps(model), backend.normalizer])
    _split_text(backend, model)
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
    denormalizer: dict[int, Value] = {}
    for number, value in _fields(encoded):
        if number == 1:
            pieces.append(_parse_piece(_as_bytes(value)))
        elif number == 2:
            trainer.update(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer.update(_fields(_as_bytes(value)))
        elif number == 5:
            denormalizer.update(_fields(_as_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SentencePieceModel(
        tokens=[piece for piece, _, _ in pieces],
        scores=[score for _, score, _ in pieces],
        types=[kind for _, _, kind in pieces],
        model_type=_as_int(trainer.get(3, _UNIGRAM)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        charsmap=_as_bytes(normalizer.get(2, b"")),
        unserved=tuple(_unserved_options(trainer, normalizer, denormalizer)),
        unk_id=_as_int(trainer.get(40, 0)),
        bos_id=_as_int(trainer.get(41, 1)),
        eos_id=_as_int(trainer.get(42, 2)),
    )


def _unserved_options(
    trainer: Mapping[int, Value], normalizer: Mapping[int, Value], denormalizer: Mapping[int, Value]
) -> Iterator[str]:
    model_type = _as_int(trainer.get(3, _UNIGRAM))
    if model_type not in (_UNIGRAM, _BPE):
        yield f"model_type {_MODEL_TYPES.get(model_type, model_type)}"
    if trainer.get(24, 0):
        yield "treat_whitespace_as_suffix"
    if not normalizer.get(5, 1):
        yield "escape_whitespaces off"
    if denormalizer.get(2):
        yield "a denormalizer"


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
    is_piece = [kind not in (_CONTROL, _UNKNOWN, _BYTE) for kind in model.types]
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


def _normalizer_steps(model: SentencePieceModel) -> Iterator[Any]:
    """What comes before spaces become `▁`: the rules for characters, then those for spaces."""
    if model.charsmap:
        charsmap = normalizers.Precompiled(model.charsmap)
        # The library maps whole graphemes and would keep one of these two.
        yield normalizers.Replace("\r\n", charsmap.normalize_str("\r") + charsmap.normalize_str("\n"))
        yield charsmap
    if model.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")


def _split_text(backend: Backend, model: SentencePieceModel) -> None:
    """Cut the normalised text so that user-defined pieces stay whole, and so that no text is taken for a byte piece."""
    defined = [token for token, kind in zip(model.tokens, model.types, strict=True) if kind == _USER_DEFINED and token]
    patterns = [_pattern_of(defined)] if defined else []
    if model.model_type == _UNIGRAM and _BYTE in model.types:
        patterns.append(_INSIDE_A_BYTE)
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    if defined and isinstance(backend.model, models.BPE):
        backend.model.ignore_merges = True


def _pattern_of(tokens: Sequence[str]) -> str:
    """Write the regular expression of some tokens, the longest first; by first letter, for models have thousands."""
    rests: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        rests.setdefault(token[0], []).append(_escape(token[1:]))
    return "|".join(f"{_escape(first)}(?:{'|'.join(alternatives)})" for first, alternatives in rests.items())


def _escape(token: str) -> str:
    return "".join(f"\\x{{{ord(char):X}}}" for char in token)


def _add_special_tokens(backend: Backend, model: SentencePieceModel) -> None:
    pairs = zip(model.tokens, model.types, strict=True)
    special = [token for token, kind in pairs if kind in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
