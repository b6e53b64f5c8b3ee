"""A front end over an engine that the test plays itself: no HTTP, no sockets, no processes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_byte_tokenizer

from quire_server.engine.border.messages import EngineReady
from quire_server.engine.border.output_stream import OutputStream
from quire_server.engine.output import EngineCoreOutput
from quire_server.engine.request import EngineRequest
from quire_server.frontend.frontend import Frontend
from quire_server.frontend.metrics import ServerMetrics
from quire_server.generation.request import GenerationRequest, Prompt
from quire_server.shared.config import EngineConfig, ModelConfig, SchedulerConfig, ServerConfig
from quire_server.shared.sampling_params import SamplingParams
from quire_server.tokens.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes as tokens, and three special ones."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(path)
    return load_tokenizer(path)


class PlayedEngine:
    """What `Frontend` asks of an engine client. Requests come here in order, and the test brings their outputs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.requests: list[EngineRequest] = []
        self.aborted: list[int] = []
        """Numbers of the requests that were ended before their end."""
        self.refusal: tuple[int, Exception] | None = None
        """The number of the request that is not taken, and why."""
        self.info = EngineReady(
            max_model_len=64,
            vocab_size=1000,
            num_blocks=16,
            block_size=16,
            dtype="float32",
            device="cpu",
            weights_bytes=1,
            kv_cache_bytes=1,
            load_seconds={},
        )
        self._streams: list[OutputStream] = []
        self._tokenizer = tokenizer

    def generate(self, request: EngineRequest) -> OutputStream:
        if self.refusal is not None and len(self.requests) == self.refusal[0]:
            raise self.refusal[1]
        number = len(self.requests)
        self.requests.append(request)
        self._streams.append(OutputStream(request.request_id, lambda _: self.aborted.append(number)))
        return self._streams[-1]

    def emit(self, number: int, text: str = "", **fields: Any) -> None:
        """Bring what one step added to a request."""
        stream = self._streams[number]
        fields.setdefault("new_token_ids", self._tokenizer.encode(text, add_special_tokens=False))
        stream.put(EngineCoreOutput(request_id=stream.request_id, **fields))

    def fail(self, number: int, error: Any) -> None:
        self._streams[number].fail(error)


class World:
    """A loaded front end and its engine."""

    def __init__(self, tokenizer: Tokenizer, **scheduler: int) -> None:
        model = ModelConfig(model="tiny", path=Path("/models/tiny"), served_model_names=("tiny",))
        config = EngineConfig(model=model, scheduler=SchedulerConfig(**scheduler))
        self.engine = PlayedEngine(tokenizer)
        client: Any = self.engine
        self.frontend = Frontend(ServerConfig(engine=config), client, ServerMetrics(config))
        self.frontend.set_model(tokenizer, {})

    @staticmethod
    def ask(*prompts: str, n: int = 1, **fields: Any) -> GenerationRequest:
        """Build a request for `n` answers to each prompt; fields that sampling does not know are the request's."""
        own = {name: fields.pop(name) for name in ("priority", "cache_salt", "request_id") if name in fields}
        params = SamplingParams(n=n, **{"max_tokens": 99, **fields})
        return GenerationRequest(
            **{"request_id": "mine", **own},
            prompts=[Prompt(token_ids=list(prompt.encode()), sampling_params=params) for prompt in prompts],
        )


@pytest.fixture
def world(tokenizer: Tokenizer) -> World:
    return World(tokenizer)


@pytest.fixture(scope="session")
def build_world(tokenizer: Tokenizer) -> Callable[..., World]:
    """Build one with options of `SchedulerConfig`."""
    return lambda **scheduler: World(tokenizer, **scheduler)


@pytest.fixture
def turn() -> Callable[[], Any]:
    """Let every task that can run do so."""

    async def turn() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    return turn
