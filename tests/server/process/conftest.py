import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quire_server.engine.border.client import EngineClient
from quire_server.engine.border.launch import EngineProcess
from quire_server.engine.request import EngineRequest
from quire_server.shared.config import EngineConfig, ModelConfig, SchedulerConfig
from quire_server.shared.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parent))  # this folder's helper modules (`client_helpers`)

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")

OpenClient = Callable[..., AbstractAsyncContextManager[EngineClient]]


def fake_command(behaviour: str) -> tuple[str, ...]:
    return (sys.executable, str(FAKE_ENGINE), behaviour)


def build_config(**scheduler: Any) -> EngineConfig:
    model = ModelConfig(model="fake", path=Path("/nowhere"), served_model_names=("fake",))
    return EngineConfig(model=model, scheduler=SchedulerConfig(**scheduler))


def build_request(
    request_id: str, num_tokens: int = 5, *, first_token: int = 65, num_branches: int = 1, **params: Any
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(range(first_token, first_token + num_tokens)),
        num_branches=num_branches,
        params=SamplingParams(max_tokens=1000, **params),
        arrival_time=50.0,
    )


@pytest.fixture
def open_client() -> OpenClient:
    @asynccontextmanager
    async def open_client(
        behaviour: str, *, wait: bool = True, heartbeat_timeout_s: float = 30.0, on_step: Any = None, **scheduler: Any
    ) -> AsyncIterator[EngineClient]:
        process = EngineProcess(fake_command(behaviour))
        client = EngineClient(
            process, build_config(**scheduler), heartbeat_timeout_s=heartbeat_timeout_s, on_step=on_step
        )
        await client.start()
        try:
            if wait:
                await client.wait_until_ready()
            yield client
        finally:
            await client.stop()

    return open_client


@pytest.fixture
def make_request() -> Callable[..., EngineRequest]:
    return build_request


@pytest.fixture
def engine_command() -> Callable[[str], tuple[str, ...]]:
    return fake_command


@pytest.fixture
def engine_config() -> EngineConfig:
    return build_config()
