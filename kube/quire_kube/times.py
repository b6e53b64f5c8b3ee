"""Times as Kubernetes writes them: RFC 3339 in UTC, to the second. Knows no clock."""

from datetime import UTC, datetime
from typing import Any


def format_time(unix_s: float) -> str:
    """Return `2026-01-31T12:00:00Z`."""
    return datetime.fromtimestamp(int(unix_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: Any) -> float | None:
    """Return Unix seconds; None where there is no time, or no readable one."""
    if not isinstance(text, str):
        return None
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return None
    return parsed.timestamp() if parsed.tzinfo is not None else None
