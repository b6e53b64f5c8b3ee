"""The whole process, `quire operator` as a user starts it, against an API server over HTTP."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fake_api_server import FakeApiServer

from quire_contract import names
from quire_operator.process.settings_file import SettingsFile
from quire_operator.spec.kinds import JOB, LEASE, LLM_DEPLOYMENT, SERVICE
from quire_operator.spec.settings import SettingsError

LEASE_PATH = f"/apis/{LEASE.api_version}/namespaces/quire-system/leases/{names.OPERATOR_LEASE}"
EXEC_API = "client.authentication.k8s.io/v1beta1"
SERVICES = f"/api/v1/namespaces/ns/{SERVICE.plural}"


def make_llm(name: str) -> dict[str, Any]:
    return {
        "apiVersion": LLM_DEPLOYMENT.api_version,
        "kind": LLM_DEPLOYMENT.kind,
        "metadata": {"name": name, "namespace": "ns", "generation": 1},
        "spec": {"model": {"uri": "hf://org/model"}, "resources": {"limits": {"cpu": 1, "memory": "1Gi"}}},
    }


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


class Operator:
    """One running process."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    async def role(self) -> str:
        said = re.search(r"Health at port (\d+)", self._log.read_text())
        if said is None:
            return ""
        try:
            url = f"http://127.0.0.1:{said[1]}/readyz"
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                return await response.text()
        except aiohttp.ClientError:
            return ""

    async def until_role(self, role: str) -> None:
        async with asyncio.timeout(60):
            while await self.role() != role:
                assert self.process.returncode is None, self._log.read_text()
                await asyncio.sleep(0.05)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(30):
            return await self.process.wait()


@asynccontextmanager
async def operator(
    server: FakeApiServer, tmp_path: Path, identity: str, user: dict[str, Any] | None = None
) -> AsyncIterator[Operator]:
    kubeconfig, log = tmp_path / "kubeconfig", tmp_path / f"{identity}.log"
    server.write_kubeconfig(kubeconfig, user)
    words = ["operator", "--identity", identity, "--lease-namespace", "quire-system", "--lease-duration", "15s"]
    words += ["--health-port", "0", "--metrics-port", "0"]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "quire_cli", *words),
            env={**os.environ, "KUBECONFIG": str(kubeconfig)},
            stdout=output,
            stderr=output,
        )
    try:
        yield Operator(process, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def holder(server: FakeApiServer) -> str | None:
    lease = server.objects.get(LEASE_PATH)
    return None if lease is None else lease["spec"]["holderIdentity"]


def test_children_appear_heal_and_a_restart_writes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = FakeApiServer()
        async with server.running():
            server.put(make_llm("a"))
            async with operator(server, tmp_path, "one") as first:
                await until(lambda: f"{SERVICES}/a" in server.objects)
                await first.until_role("leader")
                server.delete(server.objects[f"{SERVICES}/a"])
                await until(lambda: f"{SERVICES}/a" in server.objects)
                await until(lambda: any(JOB.plural in path for path in server.objects))
                await _until_quiet(server)
                await first.stop(signal.SIGKILL)
            assert holder(server) == "one"
            num_writes = len(server.writes)
            async with operator(server, tmp_path, "one") as second:
                await second.until_role("leader")
                await _until_quiet(server)
                assert server.writes[num_writes:] == []
                assert await second.stop() == 0
            llm = server.objects["/apis/quire.dev/v1alpha1/namespaces/ns/llmdeployments/a"]
            assert "finalizers" not in llm["metadata"]
            assert not [name for name in llm["metadata"].get("annotations", {}) if "kopf" in name]

    asyncio.run(scenario())


def test_one_leads_and_the_other_takes_over_when_it_is_told_to_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = FakeApiServer()
        async with (
            server.running(),
            operator(server, tmp_path, "one") as one,
        ):
            await one.until_role("leader")
            async with operator(server, tmp_path, "two") as two:
                await two.until_role("standby")
                assert holder(server) == "one"
                assert await one.stop() == 0
                await two.until_role("leader")
                assert holder(server) == "two"
                assert await two.stop() == 0
            assert holder(server) == ""

    asyncio.run(scenario())


def test_credentials_of_an_exec_plugin_are_asked_for_again_when_they_are_refused(tmp_path: Path) -> None:
    """As EKS, GKE and AKS write kubeconfigs; client-go runs the plugin anew on 401 too."""
    token, runs = tmp_path / "token", tmp_path / "runs"
    answer = {"apiVersion": EXEC_API, "kind": "ExecCredential", "status": {"token": "TOKEN"}}
    plugin = tmp_path / "get-token"
    plugin.write_text(f"#!/bin/sh\necho >> {runs}\nsed s/TOKEN/$(cat {token})/ <<'END'\n{json.dumps(answer)}\nEND\n")
    plugin.chmod(0o755)
    user = {"exec": {"apiVersion": EXEC_API, "command": str(plugin), "args": None, "interactiveMode": "IfAvailable"}}

    async def scenario() -> None:
        server = FakeApiServer()
        server.token = "first"
        token.write_text("first")
        async with server.running(), operator(server, tmp_path, "one", user) as running:
            await running.until_role("leader")
            num_runs = len(runs.read_text())
            token.write_text("second")
            server.token = "second"
            server.expire_watches()
            server.put(make_llm("a"))
            await until(lambda: f"{SERVICES}/a" in server.objects)
            assert len(runs.read_text()) > num_runs
            assert await running.stop() == 0
        assert holder(server) == ""

    asyncio.run(scenario())


def test_an_exec_plugin_that_fails_is_a_usage_error_with_its_words(tmp_path: Path) -> None:
    plugin = tmp_path / "get-token"
    plugin.write_text("#!/bin/sh\necho log in first >&2\nexit 3\n")
    plugin.chmod(0o755)
    server = FakeApiServer()
    server.url = "http://127.0.0.1:9"
    server.write_kubeconfig(tmp_path / "kubeconfig", {"exec": {"apiVersion": EXEC_API, "command": str(plugin)}})
    ports = ("--health-port", "0", "--metrics-port", "0")
    found = _run_operator(tmp_path, *ports, KUBECONFIG=str(tmp_path / "kubeconfig"))
    assert found.returncode == 2
    assert "log in first" in found.stderr
    assert "Traceback" not in found.stderr


def test_no_api_server_is_a_usage_error(tmp_path: Path) -> None:
    found = _run_operator(tmp_path, "--health-port", "0", "--metrics-port", "0", KUBECONFIG=str(tmp_path / "missing"))
    assert found.returncode == 2
    assert "quire operator:" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lease-duration", "soon"), "'soon' is not a duration"),
        (("--lease-duration", "500ms"), "500ms is not 1s or more"),
        (("--workers", "0"), "0 is not 1 or more"),
        (("--config", "missing.yaml"), "missing.yaml"),
    ],
)
def test_wrong_arguments(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    found = _run_operator(tmp_path, *words)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_settings_file_is_read_again_and_a_bad_one_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "operator.yaml"
    path.write_text("priorityClassName: low\n")
    settings = SettingsFile(path)
    assert settings.current.priority_class_name == "low"
    assert not settings.reload()
    path.write_text("priorityClassName: higher\n")
    assert settings.reload()
    assert settings.current.priority_class_name == "higher"
    path.write_text("priorityClass: typo in the name\n")
    assert not settings.reload()
    assert settings.current.priority_class_name == "higher"
    path.unlink()
    assert not settings.reload()
    path.write_text("priorityClassName: again\n")
    assert settings.reload()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("images: {server: x}\n", "server"),
        ("namespaces: " + "[" * 300 + "]" * 300, "nested too deeply"),
        ("namespaces: " + "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ],
)
def test_bad_settings_at_the_start_are_an_error(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "operator.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=named):
        SettingsFile(path)


async def _until_quiet(server: FakeApiServer) -> None:
    """Wait until the operator has asked for nothing but its lease for a while."""
    before, num_quiet = -1, 0
    while num_quiet < 3:
        before, is_quiet = len(server.writes), len(server.writes) == before
        num_quiet = num_quiet + 1 if is_quiet else 0
        await asyncio.sleep(1.0)


def _run_operator(tmp_path: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "quire_cli", "operator", *words],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
