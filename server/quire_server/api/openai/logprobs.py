"""Log-probabilities in the shapes of the two endpoints. Pure."""

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


def build_completion_logprobs(
    positions: Iterable[PositionLogprobs], *, first_token: str | None, text_offset: int, as_ids: bool
) -> CompletionLogprobs:
    """Shape them for a completion.

    Args:
        first_token: with `echo`, the prompt's first token, which nothing precedes and which has no log-probability.
        text_offset: where in the whole text the first of these tokens begins.
    """
    built = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    if first_token is not None:
        _append(built, first_token, None, None, text_offset)
        text_offset += len(first_token)
    for position in positions:
        top: dict[str, float] = {}
        for entry in (*position.top, position.chosen):  # the chosen token may not be among the top
            top.setdefault(_key(entry, as_ids), entry.logprob)
        _append(built, _key(position.chosen, as_ids), position.chosen.logprob, top, text_offset)
        text_offset += len(position.chosen.token)
    return built


def _append(
    built: CompletionLogprobs, token: str, logprob: float | None, top: dict[str, float] | None, offset: int
) -> None:
    built.tokens.append(token)
    built.token_logprobs.append(logprob)
    built.top_logprobs.append(top)
    built.text_offset.append(offset)


def build_prompt_logprobs(positions: Sequence[PositionLogprobs]) -> PromptLogprobs:
    """Shape a prompt's as vLLM does: one mapping per token, null for the first."""
    built: PromptLogprobs = [None]
    for position in positions:
        built.append(
            {
                entry.token_id: PromptLogprob(logprob=entry.logprob, rank=entry.rank, decoded_token=entry.token)
                for entry in (*position.top, position.chosen)
            }
        )
    return built


def _name(entry: LogprobEntry, as_ids: bool) -> str:
    return f"token_id:{entry.token_id}" if as_ids else entry.token


def _key(entry: LogprobEntry, as_ids: bool) -> str:
    """Name a token uniquely: one that is not whole characters by its bytes, as OpenAI does in completions."""
    if as_ids or "\ufffd" not in entry.token:
        return _name(entry, as_ids)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
