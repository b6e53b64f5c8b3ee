"""Documents from outside may nest as deep as they like; every process answers that with an error that it expects.

Decoders of JSON and YAML, and whatever walks what they return, go one call deeper for each level. Past Python's limit
that is a RecursionError, which no caller of a decoder has in mind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

MAX_DEPTH: Final = 256
"""Levels that a document to be walked may have; a pod template has about twenty."""


class NestingError(ValueError):
    """A document is nested too deeply to be read. A ValueError, as other faults of its text are."""

    def __init__(self) -> None:
        super().__init__("it is nested too deeply")


@contextmanager
def bounded_nesting() -> Iterator[None]:
    """Around the reading of a document: raise NestingError where it goes too deep."""
    try:
        yield
    except RecursionError:
        raise NestingError from None


def check_depth(document: Any) -> None:
    """Refuse a document that what walks it might not come to the end of. Raises NestingError."""
    level = {id(document): document}  # by identity: in YAML the same value may be in many places
    for _ in range(MAX_DEPTH):
        children = [child for value in level.values() for child in _children(value)]
        if not children:
            return
        level = {id(child): child for child in children}
    raise NestingError


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
