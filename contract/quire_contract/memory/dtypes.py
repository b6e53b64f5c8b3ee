"""Types of elements by the names that configs and flags give them, and the bytes of one element. Knows no torch."""

from typing import Final


class FitError(ValueError):
    """The memory of this model cannot be told. The message names the field, the type or the family."""


_DTYPE_BYTES: Final = {
    **dict.fromkeys(("float32", "float"), 4),
    **dict.fromkeys(("bfloat16", "float16", "half"), 2),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), 1),
}


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of one element.

    Raises:
        FitError: the type is not known.
    """
    if dtype not in _DTYPE_BYTES:
        raise FitError(f"dtype {dtype!r} is not known; known are {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[dtype]
