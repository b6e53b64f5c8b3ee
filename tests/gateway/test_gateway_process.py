"""`quire gateway` as a process: its file, its port, its answers, its end."""

import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from quire_gateway.config import ConfigError, load_models

Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_config(content: Any) -> Path:
        path = tmp_path / "gateway.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_config


def model(**changes: Any) -> dict[str, Any]:
    return {"name": "tiny", "namespace": "default", "backends": ["http://127.0.0.1:1"], **changes}


@contextmanager
def replica(release: threading.Event | None = None) -> Iterator[int]:
    """A server that answers any POST, when `release` lets it, with a name; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if release is not None:
                release.wait(30)
            body = b'{"from": "the replica"}'
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Process:
    """A running gateway, and what it has said so far."""

    def __init__(self, config: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "quire_cli", "gateway", "--config", str(config), "--host", "127.0.0.1"]
        self.popen = subprocess.Popen([*command, "--port", "0", *flags], stderr=subprocess.PIPE, text=True)
        self.port = int(self.wait_for(r"listening on .*:(\d+),").group(1))
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_for(self, pattern: str) -> re.Match[str]:
        assert self.popen.stderr is not None
        seen = []
        for line in self.popen.stderr:
            seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"ended without saying {pattern!r}: {seen}")

    def wait_in_flight(self) -> None:
        """Wait until a request has reached a replica."""
        in_flight = re.compile(r"^quire_gateway_requests_in_flight\{.*\} 1", re.MULTILINE)
        deadline = time.monotonic() + 30
        while not in_flight.search(httpx2.get(f"{self.url}/metrics").text):
            assert time.monotonic() < deadline

    def end(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(30)


@contextmanager
def running(config: Path, *flags: str) -> Iterator[Process]:
    process = Process(config, *flags)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.wait(30)
        assert process.popen.stderr is not None
        process.popen.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_routes_and_ends_with_status_zero(write: Write, number: int) -> None:
    with replica() as port, running(write({"models": [model(backends=[f"http://127.0.0.1:{port}"])]})) as gateway:
        assert httpx2.get(f"{gateway.url}/readyz").status_code == 200
        assert [card["id"] for card in httpx2.get(f"{gateway.url}/v1/models").json()["data"]] == ["tiny"]
        answer = httpx2.post(f"{gateway.url}/v1/chat/completions", json={"model": "tiny"})
        assert (answer.status_code, answer.json()) == (200, {"from": "the replica"})
        assert httpx2.post(f"{gateway.url}/v1/chat/completions", json={"model": "other"}).status_code == 404
        assert gateway.end(number) == 0


def test_a_running_request_outlives_the_first_signal(write: Write) -> None:
    release = threading.Event()
    answers: list[httpx2.Response] = []
    config = {"models": [model(backends=["http://127.0.0.1:{port}"])]}
    with replica(release) as port:
        path = write(json.dumps(config).replace("{port}", str(port)))
        with running(path) as gateway:
            url = f"{gateway.url}/v1/chat/completions"
            asking = threading.Thread(
                target=lambda: answers.append(httpx2.post(url, json={"model": "tiny"}, timeout=30))
            )
            asking.start()
            gateway.wait_in_flight()
            gateway.popen.send_signal(signal.SIGTERM)
            gateway.wait_for("SIGTERM: no new requests")
            release.set()
            asking.join(30)
            assert gateway.popen.wait(30) == 0
    assert [answer.json() for answer in answers] == [{"from": "the replica"}]


def test_a_second_signal_does_not_wait(write: Write) -> None:
    release = threading.Event()
    with (
        replica(release) as port,
        running(write({"models": [model(backends=[f"http://127.0.0.1:{port}"])]})) as gateway,
    ):
        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            body = b'{"model": "tiny"}'
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            gateway.wait_in_flight()
            gateway.popen.send_signal(signal.SIGTERM)
            gateway.wait_for("SIGTERM: no new requests")
            gateway.popen.send_signal(signal.SIGTERM)
            gateway.wait_for("SIGTERM: ending")
            assert gateway.popen.wait(30) == 0
        release.set()


def test_a_bad_file_is_status_two_and_says_where(write: Write) -> None:
    command = [sys.executable, "-m", "quire_cli", "gateway", "--config", str(write({"models": [model(backend=[])]}))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "gateway.yaml" in done.stderr
    assert "backend" in done.stderr


def test_a_taken_port_is_status_one(write: Write) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "quire_cli", "gateway", "--config", str(write({})), "--host", "127.0.0.1"]
        port = str(taken.getsockname()[1])
        done = subprocess.run([*command, "--port", port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr


def test_what_a_file_says(write: Write) -> None:
    entry = model(servedNames=["a", "b"], backends=["http://one:8000", "http://two/", "http://[::1]:9"])
    (found,) = load_models(write({"models": [entry]}))
    assert found.key == "default/tiny"
    assert found.served_names == ("a", "b")
    assert [backend.url for backend in found.backends] == ["http://one:8000", "http://two:80", "http://[::1]:9"]


@pytest.mark.parametrize("content", ["", "{}", "models: []"])
def test_no_models_is_a_gateway_that_knows_none(write: Write, content: str) -> None:
    assert load_models(write(content)) == ()


def test_a_model_is_served_under_its_name_unless_told_otherwise(write: Write) -> None:
    assert load_models(write({"models": [model()]}))[0].served_names == ("tiny",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("models: [", "gateway.yaml"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("- a list", "object"),
        ({"model": []}, "model"),
        ({"models": [model(backends=[])]}, "models[0].backends"),
        ({"models": [model(name="")]}, "models[0].name"),
        ({"models": [model(namespace="")]}, "models[0].namespace"),
        ({"models": [model(), model()]}, "models[1]"),
        ({"models": [model(backends=["https://one"])]}, "models[0].backends[0]"),
        ({"models": [model(backends=["http://one", "one:80"])]}, "models[0].backends[1]"),
        ({"models": [model(backends=["http://one/v1"])]}, "models[0].backends[0]"),
        ({"models": [model(backends=["http://one:port"])]}, "models[0].backends[0]"),
        ({"models": [model(backends=["http://me@one"])]}, "models[0].backends[0]"),
    ],
)
def test_a_bad_file_names_the_field(write: Write, content: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_models(write(content))
    assert named in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_models(tmp_path / "nowhere.yaml")
