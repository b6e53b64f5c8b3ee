"""Pods that answer, or do not, over HTTP on this machine."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from quire_contract import names, paths
from quire_contract.model_facts import DownloadProgress
from quire_contract.phases import Phase, Readiness
from quire_operator.spec.kinds import POD
from quire_operator.watch.pod_probe import PodProbe, ProbeLoop, is_to_be_asked, parse_load

SERVER_LABELS = {names.LABEL_COMPONENT: names.COMPONENT_SERVER, names.LABEL_DEPLOYMENT: "a"}
DOWNLOAD_LABELS = {names.LABEL_COMPONENT: names.COMPONENT_DOWNLOAD}
METRICS = b"""# HELP vllm:num_requests_running Requests in the execution batch.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {b}"} 3.0
vllm:num_requests_running{engine="1",model_name="a {b}"} 1.0
vllm:num_requests_waiting{engine="0",model_name="a {b}"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 100.0
"""


def make_pod(
    labels: dict[str, str], address: str = "127.0.0.1", *, phase: str = "Running", is_ready: bool = False
) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True" if is_ready else "False"}]
    return {
        "apiVersion": POD.api_version,
        "kind": POD.kind,
        "metadata": {"name": "pod", "namespace": "ns", "uid": "u", "labels": labels},
        "status": {"phase": phase, "podIP": address, "conditions": conditions},
    }


class Pod:
    """One HTTP server that stands for every pod."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.num_asked = 0

    @asynccontextmanager
    async def probed(self) -> AsyncIterator[PodProbe]:
        async def answer(request: web.Request) -> web.Response:
            self.num_asked += 1
            status, body = self.answers.get(request.path, (404, b""))
            return web.Response(status=status, body=body)

        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        probe = PodProbe(server_port=port, progress_port=port)
        try:
            yield probe
        finally:
            await probe.close()
            await runner.cleanup()


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def test_readiness_is_read_from_503_too() -> None:
    async def scenario() -> None:
        pod = Pod()
        pod.answers[paths.READYZ] = (503, b'{"phase":"Loading","percent":40}')
        async with pod.probed() as probe:
            found = await probe.fetch_readiness([make_pod(SERVER_LABELS)])
        assert found == {"pod": Readiness(phase=Phase.LOADING, percent=40)}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "answer",
    [
        (500, b'{"phase":"Ready"}'),
        (200, b"<html>"),
        (200, b'{"phase":"New"}'),
        (200, b'{"phase":"Ready","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        (200, b'{"phase":"Ready","message":"\xff"}'),
    ],
)
def test_useless_answers_are_none(answer: tuple[int, bytes]) -> None:
    async def scenario() -> None:
        pod = Pod()
        pod.answers[paths.READYZ] = answer
        async with pod.probed() as probe:
            assert await probe.fetch_readiness([make_pod(SERVER_LABELS)]) == {}

    asyncio.run(scenario())


def test_pods_that_do_not_answer_are_left_out() -> None:
    async def scenario() -> None:
        async with Pod().probed() as probe:
            unreachable, unscheduled = make_pod(SERVER_LABELS, "127.0.0.2"), make_pod(SERVER_LABELS, "")
            unscheduled["metadata"]["uid"] = "v"
            assert await probe.fetch_readiness([unreachable, unscheduled]) == {}
            assert await probe.fetch_loads([unreachable, unscheduled]) == {}
            assert await probe.fetch_progress(make_pod(DOWNLOAD_LABELS, "127.0.0.2")) is None

    asyncio.run(scenario())


def test_loads_are_asked_anew_each_time() -> None:
    async def scenario() -> None:
        pod = Pod()
        pod.answers[paths.METRICS] = (200, METRICS)
        async with pod.probed() as probe:
            assert await probe.fetch_loads([make_pod(SERVER_LABELS)]) == {"pod": 6}
            pod.answers[paths.METRICS] = (200, METRICS.replace(b" 3.0", b" 0.0"))
            assert await probe.fetch_loads([make_pod(SERVER_LABELS)]) == {"pod": 3}

    asyncio.run(scenario())


def test_reconcile_and_loop_do_not_ask_twice() -> None:
    async def scenario() -> None:
        pod = Pod()
        pod.answers[paths.PROGRESS] = (200, b'{"doneBytes":1,"totalBytes":9}')
        async with pod.probed() as probe:
            download = make_pod(DOWNLOAD_LABELS)
            assert await probe.ask_again(download)
            assert await probe.fetch_progress(download) == DownloadProgress(done_bytes=1, total_bytes=9)
            assert pod.num_asked == 1
            assert not await probe.ask_again(download)
            pod.answers[paths.PROGRESS] = (200, b'{"doneBytes":5,"totalBytes":9}')
            assert await probe.ask_again(download)

    asyncio.run(scenario())


def test_loop_names_a_pod_whenever_its_answer_changes() -> None:
    async def scenario() -> None:
        pod = Pod()
        named: list[dict[str, Any]] = []
        pod.answers[paths.READYZ] = (503, b'{"phase":"Loading"}')
        async with pod.probed() as probe:
            loop = ProbeLoop(probe, named.append, interval_s=0.01)
            task = asyncio.ensure_future(loop.run())
            loop.saw_pod("ADDED", make_pod(SERVER_LABELS))
            await until(lambda: len(named) == 1)
            asked = pod.num_asked
            await until(lambda: pod.num_asked > asked + 3)
            assert len(named) == 1
            pod.answers[paths.READYZ] = (503, b'{"phase":"WarmingUp"}')
            await until(lambda: len(named) == 2)
            assert named[0]["metadata"]["labels"] == SERVER_LABELS
            loop.saw_pod("MODIFIED", make_pod(SERVER_LABELS, is_ready=True))
            assert loop.num_pods == 0
            task.cancel()

    asyncio.run(scenario())


def test_deleted_pod_is_asked_no_more() -> None:
    async def scenario() -> None:
        async with Pod().probed() as probe:
            loop = ProbeLoop(probe, lambda pod: None, interval_s=1.0)
            loop.saw_pod("", make_pod(DOWNLOAD_LABELS))
            assert loop.num_pods == 1
            loop.saw_pod("DELETED", make_pod(DOWNLOAD_LABELS))
            assert loop.num_pods == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        (make_pod(SERVER_LABELS), True),
        (make_pod(SERVER_LABELS, is_ready=True), False),
        (make_pod(DOWNLOAD_LABELS, is_ready=True), True),
        (make_pod(DOWNLOAD_LABELS, phase="Pending"), False),
        (make_pod(SERVER_LABELS, ""), False),
        (make_pod({names.LABEL_COMPONENT: names.COMPONENT_GATEWAY}), False),
    ],
)
def test_who_is_asked(pod: dict[str, Any], expected: bool) -> None:
    assert is_to_be_asked(pod) is expected
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert not is_to_be_asked(pod)


def test_load_without_the_series_is_not_zero() -> None:
    assert parse_load(METRICS) == 6
    assert parse_load(b"up 1\n") is None
    assert parse_load(b"vllm:num_requests_running nonsense\n") is None
