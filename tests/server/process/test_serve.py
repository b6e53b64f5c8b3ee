"""The API process as a whole, with an engine process that computes nothing."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from quire_contract.paths import TERMINATION_LOG_ENV
from quire_contract.termination import decode_termination

RUNNER = """
import sys
import quire_server.api_process.serve
from quire_server.engine.border.launch import EngineProcess
command = tuple(sys.argv[2].split("|"))
quire_server.api_process.serve.EngineProcess = lambda: EngineProcess(command)
from quire_cli.__main__ import main
code = main(["serve", *sys.argv[3:]])
assert "torch" not in sys.modules, "the API process imported torch"
assert "transformers" not in sys.modules
sys.exit(code)
"""


class Server:
    """A `quire serve` in a process of its own."""

    def __init__(
        self,
        directory: Path,
        command: tuple[str, ...],
        *flags: str,
        model: str = "",
        fds: Sequence[int] = (),
        **env: str,
    ) -> None:
        self.termination = directory / "termination"
        self.log = directory / "log"
        words = [
            model or str(directory),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--served-model-name",
            "m",
            *flags,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUNNER, "-", "|".join(command), *words],
                stderr=log,
                pass_fds=fds,
                env={**os.environ, TERMINATION_LOG_ENV: str(self.termination), **env},
            )

    @functools.cached_property
    def port(self) -> int:
        """The one that it says it listens on, once it does."""
        while True:
            if said := re.search(r"Listening on 127\.0\.0\.1:(\d+)", self.log.read_text()):
                return int(said[1])
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def get(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str, Any]:
        """Return status, body and headers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return response.status, response.read().decode(), response.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(), error.headers

    def wait_for(self, path: str, is_right: Callable[[int, str], bool]) -> None:
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                status, body, _ = self.get(path)
                if is_right(status, body):
                    return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def wait_ready(self) -> None:
        self.wait_for("/readyz", lambda status, _: status == 200)

    def stream(self) -> Any:
        """Start a streamed completion and return its open response, the first event read."""
        body = {"model": "m", "prompt": "abcdefgh", "max_tokens": 8, "stream": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        response = urllib.request.urlopen(request, timeout=20)
        assert response.readline().startswith(b"data: ")
        return response

    def exit_code(self) -> int:
        return self.process.wait(20)


@pytest.fixture
def start(tmp_path: Path, engine_command: Callable[[str], tuple[str, ...]]) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(behaviour: str, *flags: str, **options: Any) -> Server:
        save_tokenizer(tmp_path)
        servers.append(Server(tmp_path, engine_command(behaviour), *flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from quire_server.tokens.token_bytes import byte_alphabet

    backend = Tokenizer(models.BPE({char: byte for byte, char in byte_alphabet().items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "max_new_tokens": 5}')


def test_a_whole_life(start: Callable[..., Server]) -> None:
    server = start("echo", "--swap-space", "4", "--log-format", "json")
    server.wait_ready()
    status, body, _ = server.get("/v1/completions", {"model": "m", "prompt": "abcd", "max_tokens": 3})
    assert (status, json.loads(body)["choices"][0]["text"]) == (200, "abc")
    status, body, _ = server.get("/metrics")
    assert 'vllm:generation_tokens_total{model_name="m",engine="0"} 3.0' in body
    assert 'vllm:request_success_total{model_name="m",engine="0",finished_reason="length"} 1.0' in body
    assert server.get("/livez")[0] == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code() == 0
    assert not server.termination.exists()
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    messages = [entry["message"] for entry in entries]
    assert any(message.startswith("--swap-space") for message in messages)
    assert any(message.startswith("Ready in ") for message in messages)
    assert any("'temperature': 0.6" in message for message in messages)
    assert any("POST /v1/completions" in message for message in messages)
    assert not any("/livez" in message for message in messages)


def test_the_phase_is_told_while_the_engine_loads(start: Callable[..., Server]) -> None:
    server = start("never-ready")
    server.wait_for("/readyz", lambda status, body: status == 503 and "Loading the weights" in body)
    readiness = json.loads(server.get("/readyz")[1])
    assert readiness == {"phase": "Loading", "message": "Loading the weights", "percent": 50.0}
    assert server.get("/livez")[0] == 200
    status, body, headers = server.get("/v1/completions", {"model": "m", "prompt": "a"})
    assert (status, json.loads(body)["error"]["reason"]) == (503, "model_loading")
    assert int(headers["Retry-After"]) > 0
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code() == 0


@pytest.mark.parametrize(
    ("behaviour", "code", "stage"),
    [("fails-to-load", "OutOfMemory", "Loading"), ("exits-while-loading", "EngineDied", "Loading")],
)
def test_a_failed_start_ends_with_its_reason(
    start: Callable[..., Server], behaviour: str, code: str, stage: str
) -> None:
    server = start(behaviour)
    assert server.exit_code() == 1
    message = decode_termination(server.termination.read_bytes())
    assert message is not None
    assert (message.code, message.stage) == (code, stage)
    assert code in server.log.read_text()


def test_an_engine_that_dies_under_a_request(start: Callable[..., Server]) -> None:
    server = start("dies")
    server.wait_ready()
    with server.stream() as response:
        rest = response.read().decode()
    assert "engine_dead" in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert server.exit_code() == 1
    message = decode_termination(server.termination.read_bytes())
    assert message is not None
    assert (message.code, message.stage) == ("EngineDied", "Serving")


def test_a_broken_tokenizer_ends_the_start(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start("never-ready", "--tokenizer", str(tmp_path.parent))
    assert server.exit_code() == 1
    message = decode_termination(server.termination.read_bytes())
    assert message is not None
    assert message.code == "BadCheckpoint"
    assert "tokenizer.json" in message.message


def test_draining_refuses_waits_and_then_aborts(start: Callable[..., Server]) -> None:
    server = start("holds", "--shutdown-timeout", "60")
    server.wait_ready()
    with server.stream() as response:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("/readyz", lambda status, body: status == 503 and json.loads(body)["phase"] == "Draining")
        status, body, headers = server.get("/v1/completions", {"model": "m", "prompt": "a"})
        assert (status, json.loads(body)["error"]["reason"]) == (503, "draining")
        assert headers["Retry-After"]
        assert server.get("/livez")[0] == 200
        server.process.send_signal(signal.SIGTERM)  # enough of waiting
        rest = response.read().decode()
    assert '"reason":"draining"' in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert server.exit_code() == 0
    assert not server.termination.exists()


def test_draining_ends_at_its_time(start: Callable[..., Server]) -> None:
    server = start("holds", "--shutdown-timeout", "0.1")
    server.wait_ready()
    with server.stream() as response:
        server.process.send_signal(signal.SIGINT)
        assert "shut down" in response.read().decode()
    assert server.exit_code() == 0


def test_a_taken_port_is_named(start: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start("echo", "--port", str(taken.getsockname()[1]))
        assert server.exit_code() == 1
    message = decode_termination(server.termination.read_bytes())
    assert message is not None
    assert message.code == "InvalidConfig"
    assert "--port" in message.message


def test_an_inherited_socket_is_served_on_instead_of_a_port(start: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = start("echo", "--fd", str(listener.fileno()), fds=[listener.fileno()])
    assert server.port == port
    server.wait_ready()
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code() == 0


@pytest.mark.parametrize("kind", [None, socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_descriptor_that_cannot_be_served_on_is_named(start: Callable[..., Server], kind: int | None) -> None:
    with open(os.devnull) if kind is None else socket.socket(type=kind) as other:
        server = start("echo", "--fd", str(other.fileno()), fds=[other.fileno()])
    assert server.exit_code() == 1
    message = decode_termination(server.termination.read_bytes())
    assert message is not None
    assert message.code == "InvalidConfig"
    assert "--fd" in message.message


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("-tp", "2"), "--tensor-parallel-size 2 is not supported"),
        (("--max-mode-len", "8"), "unrecognized arguments: --max-mode-len 8"),
        (("--num-threads", "x"), "--num-threads: 'x' is not a number"),
    ],
)
def test_wrong_arguments_are_status_two(start: Callable[..., Server], flags: tuple[str, ...], problem: str) -> None:
    server = start("echo", *flags)
    assert server.exit_code() == 2
    assert server.log.read_text().startswith(f"quire serve: {problem}")
    message = decode_termination(server.termination.read_bytes())
    assert message is not None
    assert problem in message.message


def test_a_signal_before_the_loop_runs_ends_it_well(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start("never-ready", TMPDIR=str(tmp_path))
    while not list(tmp_path.glob("quire-*")):
        assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code() == 0
    assert not list(tmp_path.glob("quire-*")), "the sockets' directory was left"


def test_a_download_that_hangs_does_not_hold_up_the_end(start: Callable[..., Server], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server = start("echo", model="hf://org/name", HF_ENDPOINT=hub, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
        connection, _ = silent.accept()  # the question is asked, and never answered
        with connection:
            assert json.loads(server.get("/readyz")[1])["phase"] == "Downloading"
            server.process.send_signal(signal.SIGTERM)
            assert server.exit_code() == 0


def test_many_at_once(start: Callable[..., Server]) -> None:
    server = start("echo")
    server.wait_ready()
    texts: list[str] = []

    def ask(prompt: str) -> None:
        _, body, _ = server.get("/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 99})
        texts.append(json.loads(body)["choices"][0]["text"])

    prompts = [chr(97 + i) * (i + 1) for i in range(20)]
    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted(prompts)
