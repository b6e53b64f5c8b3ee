"""Log-probabilities in the shapes of the two endpoints. Pure."""

import codecs
from collections.abc import Iterable, Sequence

from quire_server.api.openai.schemas.answers import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from quire_server.frontend.output_processor import LogprobEntry, PositionLogprobs


def build_chat_logprobs(positions: Iterable[PositionLogprobs], *, as_ids: bool) -> ChatLogprobs:
    """Shape them for a chat answer; with `as_ids` tokens are named `token_id:N`."""
    return ChatLogprobs(
        content=[
            ChatLogprob(
                token=_name(position.chosen, as_ids),
                logprob=position.chosen.logprob,
                bytes=list(position.chosen.bytes),
                top_logprobs=[
                    TopLogprob(token=_name(entry, as_ids), logprob=entry.logprob, bytes=list(entry.bytes))
                    for entry in position.top
                ],
            )
            for position in positions
        ]
    )


class TextOffsets:
    """Where in one answer's text its tokens begin, in order: of a character that several make, all where it does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def take(self, token_bytes: bytes) -> int:
        """Return where the next token begins."""
        offset = self._num_chars
        self._num_chars += len(self._decoder.decode(token_bytes))
        return offset


def build_completion_logprobs(
    positions: Iterable[PositionLogprobs], *, first_token: LogprobEntry | None, offsets: TextOffsets, as_ids: bool
) -> CompletionLogprobs:
    """Shape them for a completion.

    Args:
        first_token: with `echo`, the prompt's first token, which nothing precedes: its log-probability is not shown.
        offsets: of this answer, after the tokens before these.
    """
    built = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    if first_token is not None:
        _append(built, _key(first_token, as_ids), None, None, offsets.take(first_token.bytes))
    for position in positions:
        chosen = position.chosen
        top: dict[str, float] = {}
        for entry in (chosen, *position.top):  # the chosen token may not be among the top
            top.setdefault(_key(entry, as_ids), entry.logprob)
        _append(built, _key(chosen, as_ids), chosen.logprob, top, offsets.take(chosen.bytes))
    return built


def _append(
    built: CompletionLogprobs, token: str, logprob: float | None, top: dict[str, float] | None, offset: int
) -> None:
    built.tokens.append(token)
    built.token_logprobs.append(logprob)
    built.top_logprobs.append(top)
    built.text_offset.append(offset)


def build_prompt_logprobs(positions: Sequence[PositionLogprobs]) -> PromptLogprobs:
    """Shape a prompt's as vLLM does: a mapping per token, the prompt's own first in it; null for the first token."""
    built: PromptLogprobs = [None]
    for position in positions:
        shown: dict[int, PromptLogprob] = {}
        for entry in (position.chosen, *position.top):
            logprob = PromptLogprob(logprob=entry.logprob, rank=entry.rank, decoded_token=entry.token)
            shown.setdefault(entry.token_id, logprob)
        built.append(shown)
    return built


def _name(entry: LogprobEntry, as_ids: bool) -> str:
    return f"token_id:{entry.token_id}" if as_ids else entry.token


def _key(entry: LogprobEntry, as_ids: bool) -> str:
    """Name a token uniquely: one that is not whole characters by its bytes, as OpenAI does in completions."""
    if as_ids or "\ufffd" not in entry.token:
        return _name(entry, as_ids)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
