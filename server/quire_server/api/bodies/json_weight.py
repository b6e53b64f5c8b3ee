"""How long would decoding a body take? Asked before, as nothing can interrupt a decoder, and nothing runs beside it.

Bytes alone do not tell: a long text costs a nanosecond a byte, a list of lists thirty times that, and a number such as
1e300 thirty microseconds. So what stands outside of texts is counted, and each kind weighs what it costs at worst.
"""

import asyncio
from functools import lru_cache
from typing import Final

from quire_server.shared.errors import PayloadTooLargeError

_SMALL_BYTES: Final = 8 * 1024
"""A body too small to hold anything that takes long; most are."""
LONG_BYTES: Final = 64 * 1024
"""From here on counting, too, is done in a thread."""
_BUDGET_NS: Final = 50_000_000
"""What a body may cost, whatever bytes are allowed."""
_NS_PER_ALLOWED_BYTE: Final = 3
"""Who allows larger bodies than the default of 16 MiB allows them to take longer."""
_NS_PER_BYTE: Final = 2
_NS_PER_ESCAPE: Final = 20
_SHORT_BYTES: Final = 16
_BACKSLASH: Final = ord("\\")
_EXPONENT_NS: Final = 33_000
_MARK_TO_NS: Final = (
    (b",", 100),
    (b":", 200),
    (b"[", 250),
    (b"{", 250),
    (b"e", _EXPONENT_NS),
    (b"E", _EXPONENT_NS),
    (b"true", -_EXPONENT_NS),  # whose `e` is no exponent
    (b"false", -_EXPONENT_NS),
)
"""What each mark costs that stands outside of texts."""


async def check_weight(body: bytes, max_bytes: int) -> None:
    """Refuse a body that would take too long to decode. Raises PayloadTooLargeError."""
    if len(body) < _SMALL_BYTES:
        return
    budget_ns = max(_BUDGET_NS, max_bytes * _NS_PER_ALLOWED_BYTE)
    is_long = len(body) >= LONG_BYTES
    if await asyncio.to_thread(is_too_heavy, body, budget_ns) if is_long else is_too_heavy(body, budget_ns):
        raise PayloadTooLargeError(
            "The body holds more values than can be read without holding up other requests. Split it, or start the "
            "server with a larger --max-request-body-bytes."
        )


def is_too_heavy(body: bytes, budget_ns: int) -> bool:
    """Return whether decoding may take longer than that. What is no JSON weighs something too, and is refused later."""
    cost_ns = len(body) * _NS_PER_BYTE + body.count(b"\\") * _NS_PER_ESCAPE
    position = 0
    while cost_ns <= budget_ns and position < len(body):
        begin = body.find(b'"', position)
        begin = len(body) if begin < 0 else begin
        between = body[position:begin]
        cost_ns += _weigh_short(between) if len(between) <= _SHORT_BYTES else _weigh(between)
        end = body.find(b'"', begin + 1)
        is_plain = end > 0 and body[end - 1] != _BACKSLASH
        position = end + 1 if is_plain else _end_of_text(body, begin + 1)
    return cost_ns > budget_ns


def _weigh(between: bytes) -> int:
    """Return what decoding that takes which stands between two texts."""
    return sum(between.count(mark) * ns for mark, ns in _MARK_TO_NS)


_weigh_short = lru_cache(maxsize=1024)(_weigh)
"""Most of what stands between texts is a comma or a colon."""


def _end_of_text(body: bytes, start: int) -> int:
    """Return where the text ends that begins at `start`, its quote included."""
    quote = body.find(b'"', start)
    while quote >= 0:
        first = quote
        while first > start and body[first - 1] == _BACKSLASH:
            first -= 1
        if (quote - first) % 2 == 0:
            return quote + 1
        quote = body.find(b'"', quote + 1)
    return len(body)
