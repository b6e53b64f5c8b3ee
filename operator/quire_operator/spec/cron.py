"""Are five cron fields a schedule? Checked, not evaluated: whoever scales evaluates them. Pure text."""

import re
from typing import Final

_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: Final[tuple[tuple[str, int, int, dict[str, int]], ...]] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, start=1)}),
    ("day of the week", 0, 7, {name: number for number, name in enumerate(_DAYS)}),
)
_ITEM: Final = re.compile(r"(?:(\*)|(\w+)(?:-(\w+))?)(?:/(\d+))?")


def find_cron_problem(text: str) -> str | None:
    """Return what is wrong with a schedule; None where it is one."""
    parts = text.split()
    if len(parts) != len(_FIELDS):
        return f"{text!r} has {len(parts)} fields, not five (minute, hour, day, month, weekday)"
    for part, (name, low, high, names) in zip(parts, _FIELDS, strict=True):
        for item in part.split(","):
            if not _is_item(item, low, high, names):
                return f"{item!r} is not a {name} between {low} and {high}, a range, or a step such as */5"
    return None


def _is_item(item: str, low: int, high: int, names: dict[str, int]) -> bool:
    match = _ITEM.fullmatch(item)
    if match is None or (match[4] is not None and int(match[4]) == 0):
        return False
    if match[1]:
        return True
    numbers = [names.get(text.lower(), int(text) if text.isdecimal() else -1) for text in match.groups()[1:3] if text]
    return all(low <= number <= high for number in numbers) and numbers == sorted(numbers)
