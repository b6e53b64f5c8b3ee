"""All of `quire up` together: the manifest file, one supervisor a model, the gateway, and the end of it all."""

import asyncio
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from quire_cli.local.console import Console
from quire_cli.local.supervisor import ModelSupervisor, Surroundings
from quire_gateway.app import Gateway
from quire_gateway.backends import StaticBackends
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_operator.spec.validation import load_documents, validate_manifest

WATCH_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What the person said on the command line."""

    file: Path
    host: str
    port: int
    cache: Path
    logs: Path
    watch: bool


class ManifestError(Exception):
    """The file cannot be used; the message has one line per problem."""


def load_deployments(file: Path) -> dict[str, LLMDeployment]:
    """Read every LLMDeployment of a file, by `namespace/name`.

    Raises:
        ManifestError: unreadable, no document, a problem in one, or one name twice.
    """
    try:
        documents = load_documents(file)
    except (OSError, ValueError) as error:
        raise ManifestError(str(error)) from None
    problems = [
        f"{file}: {_name_of(document)}: {problem.path}: {problem.message}"
        for document in documents
        for problem in validate_manifest(document)
    ]
    if problems:
        raise ManifestError("\n".join(problems))
    if not documents:
        raise ManifestError(f"{file}: holds no LLMDeployment")
    deployments: dict[str, LLMDeployment] = {}
    for document in documents:
        try:
            deployment = LLMDeployment.from_manifest(document)
        except SpecError as error:
            raise ManifestError(f"{file}: {error}") from None
        key = f"{deployment.namespace}/{deployment.name}"
        if key in deployments:
            raise ManifestError(f"{file}: {key} is defined twice")
        deployments[key] = deployment
    return deployments


def _name_of(document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    return str(metadata.get("name", "(no name)")) if isinstance(metadata, dict) else "(no name)"


class Runtime:
    """Runs until SIGINT or SIGTERM, then stops everything that it started."""

    def __init__(self, options: UpOptions, console: Console) -> None:
        self._options = options
        self._console = console
        self._backends = StaticBackends()
        self._gateway = Gateway(self._backends)
        self._supervisors: dict[str, ModelSupervisor] = {}
        self._leaving: dict[asyncio.Task[None], ModelSupervisor] = {}
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Bring everything up; return once everything is down.

        Raises:
            ManifestError: the file cannot be used.
            OSError: the gateway's port is taken.
        """
        deployments = load_deployments(self._options.file)
        sock = socket.create_server((self._options.host, self._options.port), reuse_port=False)
        server = uvicorn.Server(
            uvicorn.Config(
                self._gateway,
                loop="none",
                http="httptools",
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="on",
            )
        )
        serving = asyncio.create_task(server.serve([sock]))
        loop = asyncio.get_running_loop()
        # uvicorn installs handlers of its own when it starts, so ours are set after it has.
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        watching: asyncio.Task[None] | None = None
        try:
            self._apply(deployments)
            self._console.line(
                "gateway", f"http://{self._shown_host()}:{sock.getsockname()[1]}/v1  (Ctrl-C stops everything)"
            )
            watching = asyncio.create_task(self._watch()) if self._options.watch else None
            await self._ended.wait()
        finally:
            self._console.line("quire", "stopping")
            if watching is not None:
                watching.cancel()
            for key in list(self._supervisors):
                self._retire(key)
            broken = [error for error in await asyncio.gather(*self._leaving, return_exceptions=True) if error]
            server.should_exit = True
            await serving
            self._console.line("quire", "stopped")
            if broken:
                raise broken[0]

    def _on_signal(self) -> None:
        if self._ended.is_set():
            self._console.line("quire", "not waiting for running requests")
            for supervisor in self._leaving.values():
                supervisor.hurry()
        self._ended.set()

    def _shown_host(self) -> str:
        return "localhost" if self._options.host in ("0.0.0.0", "127.0.0.1", "::") else self._options.host

    def _apply(self, deployments: dict[str, LLMDeployment]) -> None:
        """Start, update and stop supervisors until they are those of the file."""
        surroundings = Surroundings(
            backends=self._backends,
            demands=self._gateway.demands,
            console=self._console,
            cache=self._options.cache,
            logs=self._options.logs,
        )
        base = self._options.file.resolve().parent
        for key, deployment in deployments.items():
            if (supervisor := self._supervisors.get(key)) is None:
                self._supervisors[key] = ModelSupervisor(deployment, base, surroundings)
            elif supervisor.deployment != deployment:
                supervisor.update(deployment)
        for key in [key for key in self._supervisors if key not in deployments]:
            self._retire(key)

    def _retire(self, key: str) -> None:
        supervisor = self._supervisors.pop(key)
        task = asyncio.create_task(supervisor.stop())
        self._leaving[task] = supervisor
        task.add_done_callback(self._leaving.pop)

    async def _watch(self) -> None:
        """Re-read the file whenever it changes; a bad edit is reported and changes nothing."""
        file = self._options.file
        seen = _stamp(file)
        while True:
            await asyncio.sleep(WATCH_S)
            stamp = _stamp(file)
            if stamp == seen:
                continue
            seen = stamp
            try:
                self._apply(load_deployments(file))
                self._console.line("watch", f"{file} applied")
            except ManifestError as error:
                self._console.line("watch", f"not applied: {error}")


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size
