"""Replicas and their supervisor, with a server that is a script of a few lines."""

import asyncio
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from quire_cli.local.console import Console
from quire_cli.local.replica import Replica
from quire_cli.local.supervisor import ModelSupervisor, Surroundings
from quire_contract.phases import Phase
from quire_gateway.backends import StaticBackends
from quire_gateway.demand import DemandTable
from quire_operator.spec.llm_deployment import LLMDeployment

STUBBORN = """#!{python}
import signal
signals = [signal.SIGTERM]
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
print("up", flush=True)
signal.sigwait(signals)
print("asked", flush=True)
signal.sigwait(signals)
"""


async def until_log_has(replica: Replica, text: str) -> None:
    async with asyncio.timeout(20):
        while not replica.log.exists() or text not in replica.log.read_text():
            await asyncio.sleep(0.01)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_draining_replica_can_be_hurried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "server"
    server.write_text(STUBBORN.format(python=sys.executable))
    server.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(server))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    async def story() -> None:
        replica = Replica("r", 0, tmp_path / "log", lambda replica, before: None)
        await replica.start([], {})
        await until_log_has(replica, "up")
        replica.hurry()  # not while it serves
        stopping = asyncio.create_task(replica.stop(60))
        await until_log_has(replica, "asked")
        replica.hurry()
        await stopping
        assert replica.end is not None
        assert replica.end.exit_code == 0
        assert replica.readiness.phase is Phase.DRAINING

    before = open_descriptors()
    asyncio.run(story())
    assert open_descriptors() == before


def supervisor_of(tmp_path: Path, logs: Path, replicas: int) -> tuple[ModelSupervisor, StaticBackends, io.StringIO]:
    model = tmp_path / "m.gguf"
    model.touch()
    spec: dict[str, Any] = {
        "model": {"uri": f"file://{model}"},
        "resources": {"limits": {"cpu": 1}},
        "replicas": replicas,
        "scaling": {"mode": "Off"},
    }
    deployment = LLMDeployment.from_manifest({"metadata": {"name": "tiny"}, "spec": spec})
    said = io.StringIO()
    surroundings = Surroundings(
        backends=StaticBackends(), demands=DemandTable(), console=Console(said), cache=tmp_path, logs=logs
    )
    return ModelSupervisor(deployment, tmp_path, surroundings), surroundings.backends, said


def test_a_replica_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        supervisor, _, said = supervisor_of(tmp_path, tmp_path / "nowhere", replicas=1)
        async with asyncio.timeout(20):
            while "tiny-2 cannot be started" not in said.getvalue():
                await asyncio.sleep(0.01)
        await supervisor.stop()

    asyncio.run(story())


def test_a_model_that_leaves_does_not_take_its_successor_along(tmp_path: Path) -> None:
    async def story() -> None:
        supervisor, backends, _ = supervisor_of(tmp_path, tmp_path, replicas=0)
        async with asyncio.timeout(20):
            while (model := backends.get("default/tiny")) is None:
                await asyncio.sleep(0)
        leaving = asyncio.create_task(supervisor.stop())
        await asyncio.sleep(0)
        assert backends.get("default/tiny") is None
        backends.set(model)
        await leaving
        assert backends.get("default/tiny") is not None

    asyncio.run(story())
