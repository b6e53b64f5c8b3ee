"""The bytes that each token of a vocabulary stands for, where its decoder makes that a table.

Byte-level BPE (GPT-2, Llama 3, Qwen, …) and SentencePiece with byte fallback (Llama 2, Mistral, Gemma, …) decode token
by token: the text is the tokens' bytes, joined, as UTF-8. Other decoders (WordPiece, Metaspace, …) look at neighbours.
"""

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"


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


def build_token_bytes(backend: Backend) -> TokenBytes | None:
    """Return the table, or None where the decoder does not work token by token."""
    if backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if decoder["type"] == "ByteLevel":
        return TokenBytes(_byte_level_table(vocabulary), False)
    if decoder["type"] == "Sequence":
        kinds = [step["type"] for step in decoder["decoders"]]
        strips = kinds[3:] == ["Strip"] and _is_leading_strip(decoder["decoders"][3])
        if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and (len(kinds) == 3 or strips):
            replace = decoder["decoders"][0]
            if replace["pattern"] == {"String": _SPACE_MARK} and replace["content"] == " ":
                return TokenBytes(_byte_fallback_table(vocabulary), strips)
    return None


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
