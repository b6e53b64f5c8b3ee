"""The tokenizer that a GGUF file carries in its metadata, built to give llama.cpp's token ids.

`tokenizer.ggml.model` names the kind (`gpt2`: byte-level BPE; `llama`: SentencePiece BPE), `tokenizer.ggml.pre` how a
text is cut before merging. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from quire_server.shared.errors import CheckpointError
from quire_server.tokens.backends import (
    TokenizerParts,
    add_bos_eos,
    build_byte_fallback,
    build_byte_level,
    merges_from_scores,
)
from quire_server.tokens.model_vocabulary import known_end_tokens
from quire_server.tokens.pre_tokenizers import splits_for
from quire_server.weights.gguf_reader import read_gguf

log = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the format spells it so
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_END_OF_TURN_TOKENS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>",
    "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip
"""A GGUF has no generation config: these end an answer wherever a vocabulary has them as control tokens."""
_POSITION_ORDERED = ("gemma", "gemma2", "gemma3", "gemma3n")
"""Architectures whose scores do not follow the order of the merges; the order of the vocabulary does."""


class _Vocabulary(NamedTuple):
    tokens: list[str]
    types: list[int]

    @property
    def to_id(self) -> dict[str, int]:
        return {token: token_id for token_id, token in enumerate(self.tokens)}

    def get(self, token_id: object) -> str | None:
        """Return the token that a file's id means; None: it means none, or is no id."""
        return self.tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(self.tokens) else None


def read_gguf_tokenizer(path: Path) -> TokenizerParts:
    """Read the tokenizer of a .gguf file.

    Raises:
        CheckpointError: the file has none, or one of an unknown kind.
    """
    file = read_gguf(path)
    metadata = {key.removeprefix(_PREFIX): value for key, value in file.metadata.items() if key.startswith(_PREFIX)}
    kind, tokens = metadata.get("model"), metadata.get("tokens")
    if not tokens or kind not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise CheckpointError(f"{path}: its tokenizer is of kind {kind!r}; {known} are supported.")
    types = list(metadata.get("token_type") or [1] * len(tokens))
    vocabulary = _Vocabulary(_unique(tokens), types + [1] * (len(tokens) - len(types)))
    architecture = file.metadata.get("general.architecture", "")
    backend = _BUILDERS[kind](vocabulary, metadata, architecture)
    _add_special_tokens(backend, vocabulary)
    named = _special_tokens(metadata, vocabulary)
    _set_bos_eos(backend, metadata, named)
    return TokenizerParts(
        backend=backend,
        special_tokens=named,
        chat_templates=_chat_templates(file.metadata),
        eos_token_ids=_eos_token_ids(metadata, vocabulary),
    )


def _special_tokens(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, str]:
    """Return the tokens that have a part to play, by the names that chat templates know. One that is none is left out;
    of an end token `known_end_tokens` says so."""
    named: dict[str, str] = {}
    for name, key in _SPECIAL_IDS.items():
        token_id = metadata.get(key)
        if (token := vocabulary.get(token_id)) is not None:
            named[name] = token
        elif token_id is not None and name != "eos_token":
            log.warning(
                "The file's %s is %s, which is none of its token ids, 0 to %d: it is not used",
                key,
                token_id,
                len(vocabulary.tokens) - 1,
            )
    return named


def _unique(tokens: Sequence[str]) -> list[str]:
    """Padding tokens may share a text; each id needs one of its own."""
    seen: set[str] = set()
    unique = []
    for token_id, token in enumerate(tokens):
        name = token if token and token not in seen else f"[UNUSED_{token_id}]"
        seen.add(name)
        unique.append(name)
    return unique


def _build_byte_level(vocabulary: _Vocabulary, metadata: Mapping[str, Any], architecture: str) -> Backend:
    to_id = vocabulary.to_id
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in metadata.get("merges", ()))]
    pre_tokenizer = splits_for(metadata.get("pre") or "default")
    return build_byte_level(
        to_id,
        [(left, right) for left, right in merges if left in to_id and right in to_id and left + right in to_id],
        splits=pre_tokenizer.splits,
        add_prefix_space=bool(metadata.get("add_space_prefix", False)),
        ignore_merges=pre_tokenizer.ignore_merges,
    )


def _build_sentencepiece(vocabulary: _Vocabulary, metadata: Mapping[str, Any], architecture: str) -> Backend:
    scores = metadata.get("scores")
    if not scores or architecture in _POSITION_ORDERED:
        scores = [-float(position) for position in range(len(vocabulary.tokens))]
    is_piece = [kind not in (_CONTROL, _UNKNOWN) for kind in vocabulary.types]
    return build_byte_fallback(
        vocabulary.to_id,
        merges_from_scores(vocabulary.tokens, scores, is_piece),
        unknown_token=vocabulary.get(metadata.get("unknown_token_id", 0)),
        add_space_prefix=bool(metadata.get("add_space_prefix", True)),
    )


def _add_special_tokens(backend: Backend, vocabulary: _Vocabulary) -> None:
    """Control tokens are special; user-defined ones are ordinary text that is never cut."""
    pairs = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    unknown_is_text = [token for token, kind in pairs if kind in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in unknown_is_text])
    user_defined = [token for token, kind in pairs if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])


def _set_bos_eos(backend: Backend, metadata: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """llama.cpp's rules: what the file says; without a word, SentencePiece and some byte-level kinds add BOS."""
    adds_by_default = metadata["model"] == "llama" or splits_for(metadata.get("pre") or "default").adds_bos
    bos = special_tokens.get("bos_token") if metadata.get("add_bos_token", adds_by_default) else None
    eos = special_tokens.get("eos_token") if metadata.get("add_eos_token", False) else None
    add_bos_eos(backend, bos, eos)


def _eos_token_ids(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[int, ...]:
    declared = [metadata.get(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    to_id = vocabulary.to_id
    known = [to_id[token] for token in _END_OF_TURN_TOKENS if token in to_id]
    controls = [token_id for token_id in known if vocabulary.types[token_id] in (_CONTROL, _USER_DEFINED)]
    return known_end_tokens([each for each in declared if each is not None] + controls, len(vocabulary.tokens))


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    templates = {"default": metadata[key]} if metadata.get(key) else {}
    for name in metadata.get("tokenizer.chat_templates", ()):
        if template := metadata.get(f"{key}.{name}"):
            templates[name] = template
    return templates


_Builder = Callable[[_Vocabulary, Mapping[str, Any], str], Backend]
_BUILDERS: dict[str, _Builder] = {"gpt2": _build_byte_level, "llama": _build_sentencepiece}
