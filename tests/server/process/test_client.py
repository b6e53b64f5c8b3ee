"""The bridge against a process that speaks the messages: every request reaches one end, whatever the engine does."""

import asyncio
import os
import signal
import stat
import urllib.parse
from typing import Any

import pytest
from client_helpers import MakeRequest, OpenClient, collect, run, tokens_of, until

from quire_contract.phases import Phase, Readiness
from quire_server.engine.border.client import EngineClient
from quire_server.engine.border.launch import EngineProcess
from quire_server.engine.border.messages import EngineBusy, EngineReady, EngineStep
from quire_server.engine.output import SchedulerStats
from quire_server.engine.request import FinishReason
from quire_server.shared.config import EngineConfig
from quire_server.shared.errors import (
    DrainingError,
    EngineDeadError,
    InvalidRequestError,
    ModelLoadingError,
    QueueFullError,
)

READY = EngineReady(
    max_model_len=512,
    vocab_size=300,
    num_blocks=64,
    block_size=16,
    dtype="float32",
    device="cpu",
    weights_bytes=1,
    kv_cache_bytes=1,
    load_seconds={},
)


def test_requests_run_side_by_side_and_end(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        steps: list[Any] = []
        async with open_client("echo", on_step=steps.append) as client:
            assert client.info is not None
            assert client.info.max_model_len == 512
            assert client.readiness == Readiness(phase=Phase.READY)
            streams = [client.generate(make_request(f"r{n}", n)) for n in range(1, 30)]
            assert client.num_open_requests == 29
            results = await asyncio.gather(*map(collect, streams))
            for n, outputs in enumerate(results, start=1):
                assert tokens_of(outputs) == list(range(65, 65 + n))
                assert [output.finish_reason for output in outputs][-1] is FinishReason.LENGTH
                assert outputs[0].scheduled_time == 51.0
            assert client.num_open_requests == 0
            await until(lambda: client.stats.num_running == 0)
            assert client.stats.num_preemptions == 0
            assert steps
            assert client.last_heartbeat > 0

    run(check())


def test_a_slow_reader_gets_merged_outputs(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("echo") as client:
            stream = client.generate(make_request("slow", 20))
            await until(lambda: client.num_open_requests == 0)
            outputs = await collect(stream)
            assert len(outputs) == 1
            assert tokens_of(outputs) == list(range(65, 85))
            assert outputs[0].num_cached_tokens == 3

    run(check())


@pytest.mark.parametrize("how", ["aclose", "async with", "cancel"])
def test_an_ended_stream_aborts_in_the_engine_once(
    open_client: OpenClient, make_request: MakeRequest, how: str
) -> None:
    async def check() -> None:
        async with open_client("holds") as client:
            stream = client.generate(make_request("a"))
            assert tokens_of([await anext(stream)]) == [65]
            if how == "aclose":
                await stream.aclose()
                await stream.aclose()
            elif how == "async with":
                async with stream:
                    pass
            else:
                reader = asyncio.create_task(collect(stream))
                await asyncio.sleep(0)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            assert await collect(stream) == []
            assert client.num_open_requests == 0
            await until(lambda: client.stats.num_preemptions == 1 and client.stats.num_running == 0)

    run(check())


def test_what_is_sent_to_an_engine_that_is_not_connected_yet_goes_out_in_order(
    open_client: OpenClient, make_request: MakeRequest
) -> None:
    """It is ready, and its inbox is not: nothing is lost."""

    async def check() -> None:
        async with open_client("hears-late") as client:
            streams = [client.generate(make_request(request_id, 1)) for request_id in "abc"]
            streams[1].close()
            await asyncio.sleep(0)
            os.kill(client._process.pid, signal.SIGUSR1)
            ends = [(await collect(stream))[-1].finish_reason for stream in (streams[0], streams[2])]
            assert ends == [FinishReason.LENGTH] * 2
            await until(lambda: client.stats.num_preemptions == 1)

    run(check())


def test_ids_are_unique_while_they_run(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("echo") as client:
            await collect(client.generate(make_request("a")))
            await collect(client.generate(make_request("a")))
            first = client.generate(make_request("b"))
            with pytest.raises(InvalidRequestError, match="'b'"):
                client.generate(make_request("b"))
            assert tokens_of(await collect(first)) == [65, 66, 67, 68, 69]

    run(check())


@pytest.mark.parametrize(
    ("behaviour", "code", "message"),
    [
        ("dies", "EngineDied", "exited with code 3"),
        ("is-killed", "EngineKilled", "SIGKILL"),
        ("fails", "EngineFailed", "ValueError: bad"),
        ("garbles", "EngineFailed", "Bad message"),
    ],
)
def test_death_in_the_middle_of_a_stream(
    open_client: OpenClient, make_request: MakeRequest, behaviour: str, code: str, message: str
) -> None:
    async def check() -> None:
        async with open_client(behaviour) as client:
            streams = [client.generate(make_request("a")), client.generate(make_request("b"))]
            for stream in streams:
                with pytest.raises(EngineDeadError, match=message):
                    await collect(stream)
            await client.died.wait()
            assert client.death is not None
            assert client.death.code == code
            assert client.death.stage == "Serving"
            assert not client.is_alive
            assert client.readiness.phase is Phase.FAILED
            with pytest.raises(EngineDeadError):
                client.generate(make_request("c"))

    run(check())


@pytest.mark.parametrize(
    ("behaviour", "code", "need_bytes"),
    [("fails-to-load", "OutOfMemory", 2), ("exits-while-loading", "EngineDied", None)],
)
def test_death_while_loading(open_client: OpenClient, behaviour: str, code: str, need_bytes: int | None) -> None:
    async def check() -> None:
        async with open_client(behaviour, wait=False) as client:
            with pytest.raises(EngineDeadError):
                await client.wait_until_ready()
            assert client.death is not None
            assert (client.death.code, client.death.stage, client.death.need_bytes) == (code, "Loading", need_bytes)

    run(check())


def test_silence_is_death(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("silent", heartbeat_timeout_s=0.2) as client:
            stream = client.generate(make_request("a"))
            with pytest.raises(EngineDeadError, match="said nothing"):
                await collect(stream)
            assert client.death is not None
            assert client.death.code == "EngineHung"

    run(check())


def test_an_announced_silence_is_waited_for_and_no_longer(
    engine_config: EngineConfig, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In virtual time: what the client sleeps is all the time there is."""
    slept_s = 0.0

    async def sleep(delay_s: float) -> None:
        nonlocal slept_s
        slept_s += delay_s

    async def check() -> None:
        client = EngineClient(None, engine_config, heartbeat_timeout_s=60.0)  # type: ignore[arg-type]
        client._dispatch(READY)
        client._dispatch(EngineBusy(reason="capturing CUDA graphs", max_silence_s=600.0))
        stream = client.generate(make_request("a"))
        monkeypatch.setattr(asyncio, "sleep", sleep)
        await client._watch_heartbeat()
        assert slept_s == 600.0
        with pytest.raises(EngineDeadError, match=r"nothing for 600 s \(in capturing CUDA graphs\)"):
            await collect(stream)
        assert client.death is not None
        assert client.death.code == "EngineHung"

    run(check())


def test_what_the_engine_says_of_its_silence_reaches_the_watchdog(engine_config: EngineConfig) -> None:
    """In virtual time: ticks of a second, and nobody waits for them."""

    async def check() -> None:
        client = EngineClient(None, engine_config, heartbeat_timeout_s=60.0)  # type: ignore[arg-type]
        watchdog = client._watchdog
        assert not any(watchdog.tick(1.0) for _ in range(1000))  # it loads
        client._dispatch(READY)
        for message in (
            EngineBusy(reason="a step", max_silence_s=600.0),
            EngineStep(stats=SchedulerStats(), time=0.0, max_silence_s=600.0),
        ):
            client._dispatch(message)
            assert not any(watchdog.tick(1.0) for _ in range(600))
            assert watchdog.tick(1.0)
            client._dispatch(EngineStep(stats=SchedulerStats(), time=0.0))
            assert not any(watchdog.tick(1.0) for _ in range(60))
            assert watchdog.tick(1.0)

    run(check())


def test_heartbeats_keep_an_idle_engine_alive(open_client: OpenClient) -> None:
    async def check() -> None:
        async with open_client("echo", heartbeat_timeout_s=1.0) as client:
            seen = client.last_heartbeat
            await until(lambda: client.last_heartbeat > seen + 1.5)
            assert client.is_alive

    run(check())


def test_loading_is_told_and_requests_wait_outside(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("never-ready", wait=False, heartbeat_timeout_s=0.05) as client:
            await until(lambda: client.readiness.phase is Phase.LOADING)
            assert client.readiness == Readiness(phase=Phase.LOADING, message="Loading the weights", percent=50.0)
            with pytest.raises(ModelLoadingError, match="Loading") as caught:
                client.generate(make_request("a"))
            assert caught.value.retry_after_s
            assert client.is_alive  # an engine that loads need not beat

    run(check())


def test_a_full_queue_refuses_and_says_when_to_come_back(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        limits = {"max_num_seqs": 2, "max_num_queued_reqs": 3}
        async with open_client("holds", **limits) as client:
            streams = [client.generate(make_request(str(n))) for n in range(5)]
            with pytest.raises(QueueFullError, match="3 requests are waiting") as caught:
                client.generate(make_request("one too many"))
            assert caught.value.retry_after_s is not None
            assert caught.value.retry_after_s >= 1
            await streams[0].aclose()
            client.generate(make_request("fits"))

    run(check())


def test_draining_waits_for_what_runs(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("echo") as client:
            reader = asyncio.create_task(collect(client.generate(make_request("a", 20))))
            assert await client.drain(20.0) == 0
            assert len(tokens_of(await reader)) == 20
            assert client.readiness.phase is Phase.DRAINING
            with pytest.raises(DrainingError) as caught:
                client.generate(make_request("b"))
            assert caught.value.retry_after_s

    run(check())


def test_draining_ends_what_does_not_end(open_client: OpenClient, make_request: MakeRequest) -> None:
    async def check() -> None:
        async with open_client("holds") as client:
            stream = client.generate(make_request("a"))
            assert tokens_of([await anext(stream)]) == [65]
            assert await client.drain(0.05) == 1
            with pytest.raises(DrainingError, match="shut down"):
                await anext(stream)
            await until(lambda: client.stats.num_preemptions == 1)

    run(check())


def test_stopping_ends_the_process_and_leaves_nothing(engine_command: Any, engine_config: EngineConfig) -> None:
    async def check() -> None:
        process = EngineProcess(engine_command("echo"))
        path = urllib.parse.urlparse(process.to_engine).path
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        client = EngineClient(process, engine_config)
        await client.start()
        await client.wait_until_ready()
        await client.stop()
        assert process.exit_code == 0
        assert client.death is None
        assert not os.path.exists(os.path.dirname(path))

    run(check())
