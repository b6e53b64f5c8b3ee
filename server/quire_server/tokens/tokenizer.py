"""Text to token ids and back, by the model's own tokenizer: `tokenizer.json`, `vocab.json` + `merges.txt`, or GGUF.

Owns the vocabulary, the special tokens and the chat templates of one model. Imports neither `transformers` nor torch.
Immutable once loaded; every method may be called from any thread.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire_server.shared.errors import ContextLengthError, InvalidRequestError
from quire_server.tokens.backends import TokenizerParts
from quire_server.tokens.chat_template import compile_chat_template
from quire_server.tokens.detokenizer import BytesTextSource, TextSource, WindowTextSource
from quire_server.tokens.model_vocabulary import check_vocabulary, known_end_tokens, read_model_vocab_size
from quire_server.tokens.token_bytes import build_token_bytes
from quire_server.tokens.tokenizer_files import read_eos_token_ids, read_tokenizer_parts

log = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"


class Tokenizer:
    """One model's tokenizer."""

    def __init__(
        self, parts: TokenizerParts, extra_eos_token_ids: Sequence[object] = (), model_vocab_size: int | None = None
    ) -> None:
        self._backend = parts.backend
        self._special_tokens = parts.special_tokens
        self._templates = parts.chat_templates
        added = parts.backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_bytes = build_token_bytes(parts.backend)
        self.max_bytes_per_token = None if self._token_bytes is None else self._token_bytes.max_text_bytes
        """Most bytes of UTF-8 that one token can stand for in a text; None where nothing bounds them."""
        self._size = max(parts.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        eos = self.token_id(self.eos_token) if self.eos_token is not None else None
        own = [] if eos is None else [eos]
        self.eos_token_ids = known_end_tokens([*own, *parts.eos_token_ids, *extra_eos_token_ids], model_vocab_size)
        """Any of these ends an answer: the tokenizer's own first, then what the model's generation config adds."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; the model's embedding may have more rows."""
        return self._size

    @property
    def bos_token(self) -> str | None:
        return self._special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self._special_tokens.get("eos_token")

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self._special_ids

    @property
    def chat_template(self) -> str | None:
        """Source of the template used without tools."""
        return self._templates.get(DEFAULT_TEMPLATE) or next(iter(self._templates.values()), None)

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Return the ids of a text; special tokens written in it become their ids.

        Only a batch lets other threads run meanwhile: `encode` of one text holds the interpreter's lock to its end.

        Raises:
            InvalidRequestError: the text holds half a surrogate pair, which no encoding has.
            ContextLengthError: it has more than `max_tokens`; raised before a list of them is made.
        """
        try:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError(f"The text is not valid Unicode: {error}.", param="prompt") from error
        if max_tokens is not None and len(encoding) > max_tokens:
            raise ContextLengthError(f"The text has {len(encoding)} tokens; at most {max_tokens} are taken.")
        token_ids: list[int] = encoding.ids
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; an incomplete character becomes U+FFFD."""
        source = self.text_source(skip_special_tokens=skip_special_tokens)
        return source.push(token_ids) + source.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """Return one token's own bytes; empty for an id that is no token."""
        if self._token_bytes is None:
            return self._decode_window([token_id], skip_special_tokens=False).encode()
        table = self._token_bytes.table
        return table[token_id] if 0 <= token_id < len(table) else b""

    def token_text(self, token_id: int) -> str:
        """Return one token's own text; U+FFFD stands for bytes that are no whole character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def vocabulary_string(self, token_id: int) -> str:
        """Return a token as the vocabulary writes it, as `Ġis` for " is"; empty for an id that is no token."""
        token: str | None = self._backend.id_to_token(token_id)
        return token or ""

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact text in the vocabulary."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def text_source(self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> TextSource:
        """Return what turns the tokens that follow a prompt into text, incrementally."""
        skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        if self._token_bytes is not None:
            has_text_before = any(token_id not in self._special_ids for token_id in reversed(prompt_token_ids))
            strips = self._token_bytes.strips_first_space and not has_text_before
            return BytesTextSource(self._token_bytes.table, skipped_ids=skipped, strip_first_space=strips)

        def decode(token_ids: Sequence[int]) -> str:
            return self._decode_window(token_ids, skip_special_tokens)

        return WindowTextSource(decode, prompt_token_ids[-6:])

    def _decode_window(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Render a conversation; encode the result with `add_special_tokens=False`.

        `chat_template` is the source of another template; `kwargs` are variables for it.

        Raises:
            InvalidRequestError: the model has no chat template, or the template refuses the conversation.
        """
        source = chat_template or (self._templates.get(TOOL_TEMPLATE) if tools else None) or self.chat_template
        if source is None:
            raise InvalidRequestError(
                "This model has no chat template. Use /v1/completions, or start the server with --chat-template.",
                param="messages",
            )
        return compile_chat_template(source).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**self._special_tokens, **kwargs},
        )


def load_tokenizer(path: Path, tokenizer_path: Path | None = None, *, chat_template: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model directory or .gguf file, or the one at `tokenizer_path`.

    `chat_template` is Jinja source that replaces the model's own.

    Raises:
        CheckpointError: a file is missing or cannot be read, and the message names it; or the tokenizer is not the
            model's.
    """
    parts = read_tokenizer_parts(tokenizer_path or path)
    if chat_template is not None:
        parts = parts.with_chat_template(chat_template)
    vocab_size = read_model_vocab_size(path)
    tokenizer = Tokenizer(parts, read_eos_token_ids(path), vocab_size)
    check_vocabulary(tokenizer.vocab_size, tokenizer.encode(""), vocab_size)
    if tokenizer.chat_template is not None:
        try:
            compile_chat_template(tokenizer.chat_template)  # now, not at the first request
        except InvalidRequestError as error:
            log.warning("The model's chat template cannot be used, chat requests will fail: %s", error)
    return tokenizer
