"""The bytes that each token of a vocabulary stands for, where its decoder makes that a table.

Byte-level BPE (GPT-2, Llama 3, Qwen, …) and SentencePiece with byte fallback (Llama 2, Mistral, Gemma, …) decode token
by token: the text is the tokens' bytes, joined, as UTF-8. Other decoders (WordPiece, Metaspace, …) look at neighbours.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"
_SHRINKS_BY = {"Prepend": 1, "Replace": 1, "Lowercase": 4, "NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4}
"""How many times fewer bytes a text may have after a normaliser's step, at most: four where characters are composed or
replaced by simpler ones (𝐀 → A)."""


def byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable stand-in for each byte (https://github.com/openai/gpt-2, `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class TokenBytes(NamedTuple):
    table: list[bytes]
    """By token id; empty for ids that are no token."""
    strips_first_space: bool
    """The text loses one leading space."""
    max_text_bytes: int | None
    """Most bytes that one token can stand for in a text; None where the normaliser drops text without a bound."""


def build_token_bytes(backend: Backend) -> TokenBytes | None:
    """Return the table, or None where the decoder does not work token by token."""
    if backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if decoder["type"] == "ByteLevel":
        return _with_bound(backend, _byte_level_table(vocabulary), strips_first_space=False)
    if decoder["type"] == "Sequence":
        kinds = [step["type"] for step in decoder["decoders"]]
        strips = kinds[3:] == ["Strip"] and _is_leading_strip(decoder["decoders"][3])
        if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and (len(kinds) == 3 or strips):
            replace = decoder["decoders"][0]
            if replace["pattern"] == {"String": _SPACE_MARK} and replace["content"] == " ":
                return _with_bound(backend, _byte_fallback_table(vocabulary), strips_first_space=strips)
    return None


def _with_bound(backend: Backend, table: list[bytes], *, strips_first_space: bool) -> TokenBytes:
    steps = [] if backend.normalizer is None else _steps(json.loads(backend.normalizer.__getstate__()))
    is_bounded = all(step["type"] in _SHRINKS_BY for step in steps)
    shrinks_by = max([_SHRINKS_BY[step["type"]] for step in steps], default=1) if is_bounded else 0
    longest = max(map(len, table), default=0)
    return TokenBytes(table, strips_first_space, longest * shrinks_by if is_bounded else None)


def _steps(normalizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if normalizer["type"] == "Sequence":
        return [step for inner in normalizer["normalizers"] for step in _steps(inner)]
    if normalizer["type"] == "Replace" and not (normalizer["pattern"] == {"String": " "} and normalizer["content"]):
        return [{"type": "Replace, of whatever length"}]
    return [normalizer]


def _is_leading_strip(step: Mapping[str, object]) -> bool:
    return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)


def _byte_level_table(vocabulary: Mapping[str, int]) -> list[bytes]:
    """A token with any character outside the alphabet stands for its own UTF-8, as the decoder has it."""
    alphabet = byte_alphabet()
    to_latin1 = dict.fromkeys(range(256), "\uffff") | {ord(char): chr(byte) for byte, char in alphabet.items()}
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        try:
            table[token_id] = token.translate(to_latin1).encode("latin-1")
        except UnicodeEncodeError:
            table[token_id] = token.encode()
    return table


def _byte_fallback_table(vocabulary: Mapping[str, int]) -> list[bytes]:
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        match = _BYTE_TOKEN.fullmatch(token)
        table[token_id] = bytes([int(match[1], 16)]) if match else token.replace(_SPACE_MARK, " ").encode()
    return table
