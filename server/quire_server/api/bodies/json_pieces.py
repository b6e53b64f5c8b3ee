"""JSON of any length, written in pieces: the encoder holds the interpreter's lock to its end, so no end is far away."""

from typing import Any, Final

import msgspec

PIECE: Final = 1000
"""Items of a list that are encoded at once: a millisecond or so, whatever they are."""


def encode_in_pieces(content: msgspec.Struct) -> bytes:
    """Encode as `msgspec.json.encode` does, letting other threads run in between."""
    return msgspec.json.encode(_with_raw_lists(content))


def _with_raw_lists(value: Any) -> Any:
    """Return the value with every long list in its fields encoded already."""
    if isinstance(value, list) and len(value) > PIECE:
        pieces = (msgspec.json.encode(value[i : i + PIECE])[1:-1] for i in range(0, len(value), PIECE))
        return msgspec.Raw(b"[" + b",".join(pieces) + b"]")
    if isinstance(value, list):
        return [_with_raw_lists(item) for item in value] if value and isinstance(value[0], msgspec.Struct) else value
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.replace(
            value, **{name: _with_raw_lists(getattr(value, name)) for name in value.__struct_fields__}
        )
    return value
