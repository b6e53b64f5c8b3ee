"""Values as callers write them, read as the types that the engine speaks. Each refusal names the field and the rule.

What vLLM takes is taken: one stop text for a list of one, null for none, numpy's numbers, JSON keys for token
ids. What only looks like a number (a truth value, a text, 4.5 for an integer) is refused, for it was meant otherwise.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any, Final

from quire_server.shared.errors import InvalidRequestError

_MAX_SHOWN_KEYS: Final = 5
_MAX_SHOWN_KEY_LENGTH: Final = 64


def read_integer(name: str, value: Any) -> int:
    """Raises InvalidRequestError: it is no integer."""
    if type(value) is int:
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise _refusal(name, "an integer", value)


def read_number(name: str, value: Any) -> float:
    """Raises InvalidRequestError: it is no real number; NaN is none."""
    if type(value) is float and value == value:
        return value
    number = float("nan") if isinstance(value, bool | str | bytes | bytearray) else _as_float(value)
    if number == number:
        return number
    raise _refusal(name, "a number", value)


def read_flag(name: str, value: Any) -> bool:
    """Raises InvalidRequestError: it is neither true nor false."""
    if isinstance(value, bool):
        return value
    raise _refusal(name, "true or false", value)


def read_texts(name: str, value: Any) -> tuple[str, ...]:
    """Raises InvalidRequestError: it is neither a text nor some texts, or one of them is empty."""
    listed = (value,) if isinstance(value, str) else _listed(name, value, "a text or a list of texts")
    if not all(isinstance(text, str) and text for text in listed):
        raise _refusal(name, "texts that are not empty", value)
    return listed


def read_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Raises InvalidRequestError: it is not a list of integers. Whether a model has them is not asked here."""
    if isinstance(value, str | bytes | Mapping):
        raise _refusal(name, "a list of token ids", value)
    return tuple(read_integer(name, token_id) for token_id in _listed(name, value, "a list of token ids"))


def read_token_biases(name: str, value: Any) -> dict[int, float]:
    """Raises InvalidRequestError: it does not map token ids to numbers; the message names the keys that do not."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _refusal(name, "a mapping of token ids to numbers", value)
    read: dict[int, float] = {}
    bad: list[Any] = []
    for key, bias in value.items():
        token_id, number = _as_token_id(key), _as_float(bias)
        if token_id is None or number != number:
            bad.append(key)
        else:
            read[token_id] = number
    if bad:
        shown = ", ".join(repr(str(key)[:_MAX_SHOWN_KEY_LENGTH]) for key in bad[:_MAX_SHOWN_KEYS])
        message = f"{name} must map token ids to numbers; {len(bad)} of its keys do not: {shown}."
        raise InvalidRequestError(message, param=name)
    return read


def _as_token_id(key: Any) -> int | None:
    try:
        return int(key) if isinstance(key, str) else read_integer("", key)
    except (ValueError, InvalidRequestError):
        return None


def _listed(name: str, value: Any, rule: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise _refusal(name, rule, value)
    return tuple(value)


def _as_float(value: Any) -> float:
    """Return a number, such as a text spells one too; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _refusal(name: str, rule: str, value: Any) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {rule}, got {_shorten(repr(value))}.", param=name.partition("[")[0])


def _shorten(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
