import json
import logging
from collections.abc import Iterator

import pytest

from quire_server.shared.logs import AccessFilter, configure_logging, request_id_context


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    token = request_id_context.set(None)
    yield
    request_id_context.reset(token)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("uvicorn.access").filters.clear()
    logging.getLogger("uvicorn.access").disabled = False


def test_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("plain", "info")
    logging.getLogger("quire_server.api_process.serve").info("Created %s", "it")
    logging.getLogger("quire_server.api_process.serve").debug("hidden")
    request_id_context.set("r-1")
    logging.getLogger("uvicorn.error").warning("Other")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("INFO ")
    assert first.endswith("[api_process.serve] Created it")
    assert second.endswith("[uvicorn.error] Other request_id=r-1")


def test_a_json_line_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "debug")
    request_id_context.set("r-2")
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logging.getLogger("quire_server.x").exception('It "failed" é')
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    entry = json.loads(lines[0])
    assert entry["message"] == 'It "failed" é'
    assert (entry["level"], entry["logger"], entry["request_id"]) == ("error", "quire_server.x", "r-2")
    assert entry["time"].endswith("Z")
    assert "ValueError: bad" in entry["exception"]


@pytest.mark.parametrize(("path", "is_logged"), [("/livez", False), ("/livez?x=1", False), ("/v1/models", True)])
def test_probes_leave_no_access_line(capsys: pytest.CaptureFixture[str], path: str, is_logged: bool) -> None:
    configure_logging(excluded_paths=["/livez"])
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", path, "1.1", 200)
    assert (path in capsys.readouterr().err) is is_logged


def test_no_access_lines_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(access_log=False)
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/x", "1.1", 200)
    assert capsys.readouterr().err == ""


def test_other_records_pass_the_filter() -> None:
    record = logging.LogRecord("uvicorn.access", logging.INFO, __file__, 1, "started", None, None)
    assert AccessFilter(["/livez"]).filter(record)
