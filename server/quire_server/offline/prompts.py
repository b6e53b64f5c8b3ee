"""Prompts as callers of `LLM` write them: a text, token ids, or a mapping that names which of the two it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.field_values import read_token_ids

_TEXT = "prompt"
_TOKEN_IDS = "prompt_token_ids"


class PromptMapping(TypedDict, total=False):
    """One of the two; with both, the text is what the token ids were made from."""

    prompt: str
    prompt_token_ids: list[int]


Prompt = str | Sequence[int] | PromptMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPrompt:
    """What a prompt says. At least one of the two is there."""

    text: str | None
    token_ids: list[int] | None
    """None: the text is to be tokenised."""


def list_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts of a call: one alone is a list of one.

    Raises:
        InvalidRequestError: they are none of these.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        message = f"Prompts must be a text, token ids, a mapping, or a list of these, got {type(prompts).__name__}."
        raise InvalidRequestError(message, param=_TEXT)
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]  # one prompt, as token ids
    return list(prompts)  # type: ignore[arg-type]


def read_prompt(prompt: Prompt) -> ReadPrompt:
    """Tell what kind of prompt it is.

    Raises:
        InvalidRequestError: it is none. What is asked of the numbers in it, `EngineRequest` and the model say.
    """
    if isinstance(prompt, str):
        return ReadPrompt(text=prompt, token_ids=None)
    if isinstance(prompt, Mapping):
        return _read_mapping(prompt)
    return ReadPrompt(text=None, token_ids=list(read_token_ids(_TEXT, prompt)))


def _read_mapping(prompt: Mapping[str, Any]) -> ReadPrompt:
    unknown = [key for key in prompt if key not in (_TEXT, _TOKEN_IDS)]
    if unknown:
        message = f"A prompt has the key {unknown[0]!r}; known are {_TEXT!r} and {_TOKEN_IDS!r}."
        raise InvalidRequestError(message, param=_TEXT)
    text, token_ids = prompt.get(_TEXT), prompt.get(_TOKEN_IDS)
    if text is None and token_ids is None:
        raise InvalidRequestError(f"A prompt needs {_TEXT!r} or {_TOKEN_IDS!r}.", param=_TEXT)
    if text is not None and not isinstance(text, str):
        raise InvalidRequestError(f"{_TEXT!r} of a prompt must be a text, got {type(text).__name__}.", param=_TEXT)
    return ReadPrompt(text=text, token_ids=None if token_ids is None else list(read_token_ids(_TOKEN_IDS, token_ids)))
