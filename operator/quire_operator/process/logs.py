"""How the operator's log lines look: Kubernetes' way, one line each, plain or JSON.

Knows no content. Messages come as `Did something key=value other=value`.
"""

import json
import logging
import sys
import time
from typing import Final

PLAIN: Final = "plain"
JSON: Final = "json"
FORMATS: Final = (PLAIN, JSON)

_REPEAT_S: Final = 30.0


def set_up_logging(log_format: str) -> None:
    """Send everything to stderr; of kopf and the HTTP library only warnings, the same one twice a minute."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == JSON else _PlainFormatter())
    handler.addFilter(_Repeats(("kopf", "asyncio", "aiohttp")))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("quire_operator").setLevel(logging.INFO)


class _PlainFormatter(logging.Formatter):
    @staticmethod
    def converter(seconds: float | None = None) -> time.struct_time:
        return time.gmtime(seconds)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")


class _JsonFormatter(logging.Formatter):
    converter = _PlainFormatter.converter

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Repeats(logging.Filter):
    """Lets a line of the given libraries through once in a while: a dozen watches fail alike, time and again."""

    def __init__(self, libraries: tuple[str, ...]) -> None:
        super().__init__()
        self._libraries = libraries
        self._last_at: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] not in self._libraries:
            return True
        key = (record.name, " ".join(str(record.msg).split()[:2]))
        last_at = self._last_at.get(key, float("-inf"))
        if record.created < last_at + _REPEAT_S:
            return False
        self._last_at[key] = record.created
        return True
