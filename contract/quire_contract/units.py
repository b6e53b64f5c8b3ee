"""Durations and quantities as Kubernetes writes them, and sizes as people read them. Pure text and numbers."""

import re
from fractions import Fraction
from typing import Final

_DURATION: Final = re.compile(r"([0-9]+)(ms|s|m|h)")
_DURATION_UNIT_S: Final = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}
_QUANTITY: Final = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))([eE][+-]?[0-9]+|[numkMGTPE]|[KMGTPE]i)?")
_BINARY: Final = {f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL: Final = {letter: 1000**power for power, letter in enumerate("kMGTPE", start=1)}
_SIZE_SUFFIX: Final = {"": 1, **{unit.lower(): 1000**power for power, unit in enumerate("KMGT", start=1)}} | {
    unit: 1024**power for power, unit in enumerate("KMGT", start=1)
}
_SMALL: Final = {"m": Fraction(1, 10**3), "u": Fraction(1, 10**6), "n": Fraction(1, 10**9)}


class UnitError(ValueError):
    """The text is not a duration or quantity; the message says what would be."""


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `30s`, `5m`, `1h30m` or `500ms`.

    Raises:
        UnitError: the text is anything else.
    """
    pairs = _DURATION.findall(text)
    if not pairs or "".join(number + unit for number, unit in pairs) != text:
        raise UnitError(f"{text!r} is not a duration such as 30s, 5m or 1h30m")
    return float(sum(int(number) * _DURATION_UNIT_S[unit] for number, unit in pairs))


def parse_quantity(text: str | int | float) -> Fraction:
    """Return the exact value of a Kubernetes quantity such as `2`, `500m`, `16Gi`, `1.5G` or `2e9`.

    Raises:
        UnitError: the text is anything else.
    """
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise UnitError(f"{text!r} is not a quantity such as 2, 500m or 16Gi")
    number, suffix = Fraction(match[1]), match[2] or ""
    if suffix[:1] in ("e", "E") and len(suffix) > 1 and suffix != "Ei":
        return number * Fraction(10) ** int(suffix[1:])
    factor = _BINARY.get(suffix) or _DECIMAL.get(suffix) or _SMALL.get(suffix) or 1
    return number * factor


def parse_size(text: str) -> int:
    """Return a number of the server's command line, which may end in k, m, g, t (1000) or K, M, G, T (1024).

    Raises:
        UnitError: the text is anything else, or no whole number.
    """
    match = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)([kmgtKMGT]?)", text)
    if match is None:
        raise UnitError(f"{text!r} is not a number such as 2048, 8k (8000) or 8K (8192)")
    value = Fraction(match[1]) * _SIZE_SUFFIX[match[2]]
    if value.denominator != 1:
        raise UnitError(f"{text!r} is not a whole number")
    return int(value)


def format_bytes(size_bytes: int) -> str:
    """Return a size as people read it: `17.1 GiB`, `812 MiB`, `12 B`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.1f} {unit}"
