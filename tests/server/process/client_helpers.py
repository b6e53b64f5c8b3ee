"""What the tests of the bridge share: bounded runs, and a stream read to its end."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from quire_server.engine.border.client import EngineClient
from quire_server.engine.border.output_stream import OutputStream
from quire_server.engine.output import EngineCoreOutput
from quire_server.engine.request import EngineRequest

OpenClient = Callable[..., AbstractAsyncContextManager[EngineClient]]
MakeRequest = Callable[..., EngineRequest]


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 20)

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def collect(stream: OutputStream) -> list[EngineCoreOutput]:
    return [output async for output in stream]


def tokens_of(outputs: list[EngineCoreOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.new_token_ids]
