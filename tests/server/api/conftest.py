"""The whole HTTP layer in one process: the real application, tokenizer and engine client, and a scripted engine."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from tiny_model import save_byte_tokenizer

from quire_server.api.app import create_app
from quire_server.engine.border.client import EngineClient
from quire_server.engine.border.messages import AbortRequests, AddRequest, EngineReady, EngineStep, ToEngine
from quire_server.engine.output import EngineCoreOutput, SchedulerStats
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.frontend.frontend import Frontend
from quire_server.frontend.metrics import ServerMetrics
from quire_server.shared.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, ServerConfig
from quire_server.tokens.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 300
MAX_MODEL_LEN = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if mood is defined %}[{{ mood }}]{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Script = Callable[[EngineRequest], Sequence[EngineCoreOutput]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes as tokens, and three special ones."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(path, CHAT_TEMPLATE)
    return load_tokenizer(path)


class ScriptedEngine(EngineClient):
    """The real client; what it would send to the engine process comes to a script instead.

    With a `script`, its outputs come one by one, each in a turn of the event loop of its own; without, the test calls
    `emit` itself.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        super().__init__(None, config)  # type: ignore[arg-type]
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.script: Script | None = None
        self._tokenizer = tokenizer
        self._scripts: set[asyncio.Task[None]] = set()

    def become_ready(self) -> None:
        self._dispatch(
            EngineReady(
                max_model_len=MAX_MODEL_LEN,
                vocab_size=VOCAB_SIZE,
                num_blocks=100,
                block_size=16,
                dtype="float32",
                device="cpu",
                weights_bytes=1,
                kv_cache_bytes=1,
                load_seconds={},
            )
        )

    def answer(self, *texts: str, finish: FinishReason = FinishReason.LENGTH, **last: Any) -> None:
        """Let every request be answered with these pieces of text, one output each."""

        def script(request: EngineRequest) -> list[EngineCoreOutput]:
            outputs = [self.output(request, text) for text in texts]
            outputs[-1] = msgspec.structs.replace(outputs[-1], finish_reason=finish, **last)
            return outputs

        self.script = script

    def output(self, request: EngineRequest, text: str = "", **fields: Any) -> EngineCoreOutput:
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        return EngineCoreOutput(request_id=request.request_id, new_token_ids=token_ids, **fields)

    def emit(self, *outputs: EngineCoreOutput) -> None:
        """Bring one engine step's outputs."""
        self._dispatch(EngineStep(outputs=list(outputs), stats=SchedulerStats(), time=time.time()))

    async def next_request(self, index: int = 0) -> EngineRequest:
        """Wait for the request with this number to arrive."""
        async with asyncio.timeout(5):
            while len(self.requests) <= index:
                await asyncio.sleep(0)
        return self.requests[index]

    def _send(self, message: ToEngine) -> None:
        match message:
            case AddRequest(request):
                self.requests.append(request)
                if self.script is not None:
                    task = asyncio.get_running_loop().create_task(self._play(self.script(request)))
                    self._scripts.add(task)
                    task.add_done_callback(self._scripts.discard)
            case AbortRequests(request_ids):
                self.aborted += request_ids

    async def _play(self, outputs: Sequence[EngineCoreOutput]) -> None:
        for output in outputs:
            for _ in range(5):  # let the reader take the one before
                await asyncio.sleep(0)
            self.emit(output)


class World:
    """One server, and a client for it."""

    def __init__(self, tokenizer: Tokenizer, **options: Any) -> None:
        model = ModelConfig(model="org/tiny", path=Path("/models/tiny"), served_model_names=("tiny", "alias"))
        scheduler = SchedulerConfig(**options.pop("scheduler", {}))
        engine_config = EngineConfig(model=model, cache=CacheConfig(), scheduler=scheduler)
        self.tokenizer = tokenizer
        self.engine = ScriptedEngine(engine_config, tokenizer)
        self.frontend = Frontend(
            ServerConfig(engine=engine_config, **options), self.engine, ServerMetrics(engine_config)
        )
        self.app: Starlette = create_app(self.frontend)
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://server")

    def load(self, **generation_defaults: Any) -> None:
        self.engine.become_ready()
        self.frontend.set_model(self.tokenizer, generation_defaults)

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.http.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], **body}
        )

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"prompt": "hi", **body})

    def exchange(self, path: str, body: dict[str, Any]) -> "Exchange":
        """Start a request whose bytes are seen one by one, and that can be hung up."""
        return Exchange(self.app, path, json.dumps(body).encode())


class Exchange:
    """One request over raw ASGI, in flight."""

    def __init__(self, app: Starlette, path: str, body: bytes) -> None:
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outgoing: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"server"), (b"content-type", b"application/json")],
            "client": ("client", 1),
            "server": ("server", 80),
        }
        self.task = asyncio.ensure_future(app(scope, self._incoming.get, self._outgoing.put))

    async def next_message(self) -> dict[str, Any]:
        async with asyncio.timeout(5):
            return await self._outgoing.get()

    @property
    def has_message(self) -> bool:
        return not self._outgoing.empty()

    async def hang_up(self) -> None:
        """Leave, and wait until the server has let go."""
        self._incoming.put_nowait({"type": "http.disconnect"})
        async with asyncio.timeout(5):
            await self.task


@pytest.fixture
async def world(tokenizer: Tokenizer) -> AsyncIterator[World]:
    """A server whose model is loaded."""
    world = World(tokenizer)
    world.load()
    async with world.http:
        yield world


@pytest.fixture
def build_world(tokenizer: Tokenizer) -> Callable[..., World]:
    """Build a server with options of `ServerConfig`, whose model is not loaded yet."""
    return lambda **options: World(tokenizer, **options)


@pytest.fixture
def chat_template_world(tmp_path: Path) -> Callable[[str], World]:
    """Build a server, ready, whose model has this chat template."""

    def build(chat_template: str) -> World:
        save_byte_tokenizer(tmp_path, chat_template)
        world = World(load_tokenizer(tmp_path))
        world.load()
        return world

    return build


def parse_events(body: str) -> list[Any]:
    """Return what a stream's events hold; checks its form and that it ends with [DONE], once."""
    *events, done, rest = body.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(name="parse_events")
def _parse_events() -> Callable[[str], list[Any]]:
    return parse_events


def check_error(response: httpx.Response, status: int, *, param: str | None = None, reason: str | None = None) -> str:
    """Check an error's status and shape, vLLM's and our `reason`; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code", "reason"}
    assert (error["param"], error["code"], error["reason"]) == (param, status, reason), error
    assert error["message"]
    assert error["type"]
    message: str = error["message"]
    return message


@pytest.fixture(name="check_error")
def _check_error() -> Callable[..., str]:
    return check_error
