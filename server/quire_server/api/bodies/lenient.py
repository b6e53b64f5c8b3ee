"""Decoding a body as clients write it: scalars in their other spellings, and fields that nobody here knows.

vLLM reads bodies with pydantic's lax mode. msgspec's is nearly that; this module adds what is missing (words for
booleans, booleans for numbers), and finds the fields that a struct has no place for. Knows no dialect and no HTTP.
"""

from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec
from msgspec import inspect

from quire_contract.spellings import WORD_TO_BOOL

T = TypeVar("T", bound=msgspec.Struct)

MAX_NAMES: Final = 16
"""Most unknown fields of one body that are named; the rest is ignored without a word."""
MAX_NAME_LENGTH: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Lenient(Generic[T]):
    """A body, and what of it found no place."""

    value: T
    unknown_fields: tuple[str, ...]
    """Paths such as `messages[].annotations`, once each, printable and of bounded number and length. A field that is
    null asks for nothing, and is not among them."""


class LenientDecoder(Generic[T]):
    """Decodes JSON into one struct.

    Raises, from `decode`:
        msgspec.DecodeError: it is not JSON, or (ValidationError) not what the struct says in any spelling.
    """

    def __init__(self, type_: type[T]) -> None:
        self._type = type_
        self._decode = msgspec.json.Decoder().decode
        self._reader = _build_reader(inspect.type_info(type_))

    def decode(self, body: bytes) -> Lenient[T]:
        """Return the struct and the names of unknown fields."""
        document = self._decode(body)
        unknown: dict[str, None] = {}
        if self._reader is not None:
            document = self._reader.read(document, "", unknown)
        value = msgspec.convert(document, self._type, strict=False)
        return Lenient(value=value, unknown_fields=tuple(dict.fromkeys(map(_printable, unknown))))


class _Reader(Protocol):
    """Reads values of one type. Values of another are left for msgspec to refuse.

    Everything that a body holds passes here, so a name that is not known costs next to nothing: it is cut, and made
    printable only once the few that are shown have been chosen.
    """

    def read(self, value: Any, path: str, unknown: dict[str, None]) -> Any:
        """Return the value in its usual spelling; add the paths of fields in it that are not known."""
        ...


class _BoolReader:
    def read(self, value: Any, path: str, unknown: dict[str, None]) -> Any:
        if isinstance(value, str):
            return WORD_TO_BOOL.get(value.lower(), value)
        return bool(value) if isinstance(value, float) and value in (0.0, 1.0) else value


class _NumberReader:
    def read(self, value: Any, path: str, unknown: dict[str, None]) -> Any:
        if isinstance(value, bool):
            return int(value)
        return value.strip().removeprefix("+") if isinstance(value, str) else value


class _ListReader:
    def __init__(self, item: _Reader) -> None:
        self._item = item

    def read(self, value: Any, path: str, unknown: dict[str, None]) -> Any:
        if not isinstance(value, list):
            return value
        return [self._item.read(item, f"{path}[]", unknown) for item in value]


class _StructReader:
    def __init__(self, info: inspect.StructType) -> None:
        self._name_to_reader = {field.encode_name: _build_reader(field.type) for field in info.fields}

    def read(self, value: Any, path: str, unknown: dict[str, None]) -> Any:
        if not isinstance(value, dict):
            return value
        prefix = f"{path}." if path else ""
        read = dict(value)
        for name, item in value.items():
            if name not in self._name_to_reader:
                if item is not None and len(unknown) < MAX_NAMES:
                    unknown[(prefix + name)[: MAX_NAME_LENGTH + 1]] = None
            elif (reader := self._name_to_reader[name]) is not None:
                read[name] = reader.read(item, prefix + name, unknown)
        return read


class _UnionReader:
    """Of alternatives that JSON tells apart: a list, an object, a scalar."""

    def __init__(self, readers: list[_Reader]) -> None:
        self._readers = readers

    def read(self, value: Any, path: str, unknown: dict[str, None]) -> Any:
        for reader in self._readers:
            value = reader.read(value, path, unknown)
        return value


def _build_reader(info: inspect.Type) -> _Reader | None:
    """Return how values of a type are read; None: as they are. Lists of scalars, which may be long, are msgspec's."""
    match info:
        case inspect.Metadata(type=described):
            return _build_reader(described)
        case inspect.StructType():
            return _StructReader(info)
        case inspect.BoolType():
            return _BoolReader()
        case inspect.IntType() | inspect.FloatType():
            return _NumberReader()
        case inspect.ListType(item_type=item_type):
            item = _build_reader(item_type)
            return _ListReader(item) if isinstance(item, _StructReader | _UnionReader) else None
        case inspect.UnionType(types=types):
            return _build_union(types)
        case _:
            return None


def _build_union(types: tuple[inspect.Type, ...]) -> _Reader | None:
    """Where a text is among the alternatives, it is one, whatever it looks like."""
    has_text = any(isinstance(item, inspect.StrType | inspect.AnyType) for item in types)
    readers = [reader for item in types if (reader := _build_reader(item)) is not None]
    if has_text:
        readers = [reader for reader in readers if not isinstance(reader, _BoolReader | _NumberReader)]
    return readers[0] if len(readers) == 1 else _UnionReader(readers) if readers else None


def _printable(name: str) -> str:
    cleaned = "".join(char if char.isascii() and char.isprintable() and char not in ',"\\' else "?" for char in name)
    return cleaned if len(cleaned) <= MAX_NAME_LENGTH else cleaned[: MAX_NAME_LENGTH - 3] + "..."
