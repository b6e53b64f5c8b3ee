"""How every process of the server logs: one handler on standard error, plain lines or JSON, the request id on each.

Libraries' loggers (uvicorn's among them) have no handlers of their own and pass through this one.
"""

import json
import logging
import sys
import time
from collections.abc import Collection
from contextvars import ContextVar
from typing import Any, Literal

LogFormat = Literal["plain", "json"]

request_id_context: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that the current task works for; every log line of the task carries it."""

_QUIET_LIBRARIES = (
    *("httpx", "httpcore", "httpx2", "httpcore2", "huggingface_hub", "filelock", "asyncio", "urllib3"),
    *("aiobotocore", "botocore", "gcsfs", "google"),
)


class PlainFormatter(logging.Formatter):
    """`INFO 09-18 12:00:00 [serve] Message request_id=…`: vLLM's line, with the request id where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%m-%d %H:%M:%S", time.localtime(record.created))
        request_id = request_id_context.get()
        line = f"{record.levelname} {clock} [{_short_name(record.name)}] {record.getMessage()}"
        if request_id is not None:
            line += f" request_id={request_id}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and request_id and exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = request_id_context.get()
        if request_id is not None:
            entry["request_id"] = request_id
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class AccessFilter(logging.Filter):
    """Keeps uvicorn's access lines for some paths (probes, scrapes) out of the log."""

    def __init__(self, excluded_paths: Collection[str]) -> None:
        super().__init__()
        self._excluded_paths = frozenset(excluded_paths)

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args  # (client, method, path, HTTP version, status)
        if not isinstance(arguments, tuple) or len(arguments) < 3:
            return True
        return str(arguments[2]).partition("?")[0] not in self._excluded_paths


def configure_logging(
    log_format: LogFormat = "plain",
    log_level: str = "info",
    *,
    access_log: bool = True,
    excluded_paths: Collection[str] = (),
) -> None:
    """Send all logging of this process to standard error. Called once, at the start of the process."""
    level = logging.getLevelNamesMapping()[log_level.upper()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else PlainFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    access = logging.getLogger("uvicorn.access")
    access.disabled = not access_log
    access.filters[:] = [AccessFilter(excluded_paths)]


def _short_name(name: str) -> str:
    return name.removeprefix("quire_server.")
