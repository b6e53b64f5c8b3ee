"""A real server process, asked by the real `openai` client: what a user does, and what a pod goes through."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from quire_contract.paths import TERMINATION_LOG_ENV
from quire_contract.termination import decode_termination

DEADLINE_S = 120
MAX_NUM_SEQS = 3
HELLO: Any = [{"role": "user", "content": "hello"}]
ENDLESS: Any = {"max_tokens": 8000, "temperature": 0, "extra_body": {"ignore_eos": True}}


def wait_until(condition: Callable[[], Any]) -> Any:
    """Poll until the condition gives something true, and return that."""
    deadline = time.monotonic() + DEADLINE_S
    while not (result := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
    return result


class Server:
    """A `quire serve` process."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, termination_log: Path) -> None:
        self.process = process
        self._log = log
        self._termination_log = termination_log
        port = wait_until(lambda: re.search(r"Listening on \S+:(\d+)", self.log) or process.poll())
        assert isinstance(port, re.Match), self.log
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port[1]}", timeout=DEADLINE_S, trust_env=False)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port[1]}/v1", api_key="secret", max_retries=0, timeout=DEADLINE_S
        )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def termination(self) -> Any:
        return decode_termination(self._termination_log.read_bytes())

    def wait_until_ready(self) -> None:
        assert wait_until(lambda: self.http.get("/readyz").is_success or self.process.poll() is not None)
        assert self.process.poll() is None, self.log

    def wait_for_exit(self) -> int:
        return self.process.wait(DEADLINE_S)

    def gauge(self, name: str) -> float:
        (value,) = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(value)

    def wait_until_idle(self) -> None:
        """Wait until nothing runs or waits and every block is free."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        wait_until(lambda: not any(self.gauge(name) for name in names))

    def close(self) -> None:
        self.http.close()
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextmanager
def serve(checkpoint: Path, directory: Path, *flags: str) -> Iterator[Server]:
    log, termination_log = directory / "log", directory / "termination-log"
    command = [sys.executable, "-m", "quire_cli", "serve", str(checkpoint), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", "0", "--kv-cache-memory-bytes", "32M", "--num-threads", "1", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", TERMINATION_LOG_ENV: str(termination_log)}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        server = Server(process, log, termination_log)
    except BaseException:
        process.kill()
        process.wait()
        raise
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tests share; each leaves it idle."""
    flags = ("--api-key", "secret", "--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-queued-reqs", "1")
    with serve(tiny_checkpoint, tmp_path_factory.mktemp("server"), *flags) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client


def test_chat_whole_and_streamed_are_the_same(client):
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_completions(client):
    options: Any = {"model": "tiny", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    one = client.completions.create(prompt="hello", echo=True, **options)
    assert one.choices[0].text.startswith("hello")
    assert len(one.choices[0].logprobs.tokens) == 5 + 6
    assert one.choices[0].logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in one.choices[0].logprobs.token_logprobs[1:])
    several = client.completions.create(prompt=["hello", "good bye"], **options)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert one.choices[0].text == "hello" + several.choices[0].text
    streamed = client.completions.create(prompt="hello", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == several.choices[0].text


def test_a_prompt_as_long_as_the_context_is_scored(server, client):
    """Nothing is generated, so nothing needs room; and what follows a token does not change how likely it was."""
    options: Any = {"model": "tiny", "max_tokens": 0, "echo": True, "logprobs": 0}
    ids = [5 + position % 50 for position in range(8192)]
    whole = client.completions.create(prompt=ids, **options)
    (choice,) = whole.choices
    assert choice.finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8192, 0)
    assert len(choice.logprobs.tokens) == 8192
    (start,) = client.completions.create(prompt=ids[:100], **options).choices
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:100] == pytest.approx(start.logprobs.token_logprobs[1:], abs=0.02)
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(prompt=[5] * 8193, **options)
    assert (too_long.value.code, too_long.value.param) == ("400", "prompt")
    server.wait_until_idle()


def test_equal_seeds_give_equal_answers(client):
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 1.0, "n": 2}
    first = client.chat.completions.create(**options, seed=1)
    second = client.chat.completions.create(**options, seed=1)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert texts[0] != texts[1]


def test_logprobs(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 3
    for position in content:
        assert [top.logprob for top in position.top_logprobs] == sorted(
            (top.logprob for top in position.top_logprobs), reverse=True
        )
        assert position.logprob == position.top_logprobs[0].logprob


def test_what_other_servers_clients_send_is_taken(client):
    """A number in words, a rival's fields, tools that may not be called, more tokens than there is room for."""
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=HELLO,
        tools=[tool],
        tool_choice="none",
        max_tokens=8192,
        stop="e",
        extra_body={"top_k": "4.0", "top_a": 0.1, "repeat_penalty": 1.1},
    )
    assert raw.headers["x-quire-ignored-fields"] == "top_a, repeat_penalty"
    assert raw.parse().choices[0].finish_reason in ("stop", "length")


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_are_the_clients_own_exceptions(server, client):
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="other", messages=HELLO)
    assert (not_found.value.code, not_found.value.body["reason"]) == ("404", "model_not_found")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=100_000)
    assert (too_long.value.code, too_long.value.param) == ("400", "max_tokens")
    assert "maximum context length is 8192 tokens" in too_long.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    with (
        openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert refused.value.body["reason"] == "invalid_api_key"
    assert server.http.get("/health").status_code == 200


def test_full_queue_refuses_and_hanging_up_frees_everything(server, client):
    streams = [
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **ENDLESS)
        for _ in range(MAX_NUM_SEQS + 1)
    ]
    next(iter(streams[0]))
    wait_until(lambda: server.gauge("num_requests_running") == MAX_NUM_SEQS)
    assert server.gauge("kv_cache_usage_perc") > 0
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **ENDLESS)
    assert refused.value.body["reason"] == "queue_full"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    server.wait_until_idle()


def test_a_client_that_gives_up_waiting_frees_everything(server, client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model="tiny", messages=HELLO, **ENDLESS)
    server.wait_until_idle()
    assert server.gauge("generation_tokens_total") > 0


def test_sigterm_lets_the_running_stream_finish(tiny_checkpoint, tmp_path):
    with serve(tiny_checkpoint, tmp_path) as server:
        server.wait_until_ready()
        options: Any = {**ENDLESS, "max_tokens": 2000}
        stream = server.client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, **options
        )
        next(stream)
        (engine,) = psutil.Process(server.process.pid).children()
        engine.suspend()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.http.get("/readyz").json()["phase"] == "Draining")
        with pytest.raises(openai.InternalServerError) as refused:  # what the client calls every 5xx
            server.client.chat.completions.create(model="tiny", messages=HELLO)
        assert (refused.value.code, refused.value.body["reason"]) == ("503", "draining")
        engine.resume()
        *_, last = stream
        assert last.usage.completion_tokens == 2000
        assert server.wait_for_exit() == 0


def test_sigterm_with_no_time_ends_the_stream_with_an_error(tiny_checkpoint, tmp_path):
    with serve(tiny_checkpoint, tmp_path, "--shutdown-timeout", "0") as server:
        server.wait_until_ready()
        stream = server.client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **ENDLESS)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as ended:
            list(stream)
        assert ended.value.body["reason"] == "draining"
        assert server.wait_for_exit() == 0


def test_death_of_the_engine_ends_everything_and_says_why(tiny_checkpoint, tmp_path):
    with serve(tiny_checkpoint, tmp_path) as server:
        server.wait_until_ready()
        assert server.http.get("/livez").status_code == 200
        stream = server.client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **ENDLESS)
        next(stream)
        (engine,) = psutil.Process(server.process.pid).children()
        engine.kill()
        with pytest.raises(openai.APIError) as ended:
            list(stream)
        assert ended.value.body["reason"] == "engine_dead"
        with suppress(httpx.TransportError):  # where the process is gone already
            assert server.http.get("/livez").status_code == 503
        assert server.wait_for_exit() == 1
        assert server.termination.code == "EngineKilled"


def test_corrupt_weights_end_the_start_and_say_why(tiny_checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with serve(broken, tmp_path) as server:
        assert server.wait_for_exit() == 1
        assert server.termination.code == "BadCheckpoint"
        assert "model.safetensors" in server.termination.message
