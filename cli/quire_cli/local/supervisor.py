"""One model of `quire up`: fetch it, keep the wanted number of replicas running, and tell the gateway.

How many is decided elsewhere (`scaler.py`); this module acts on it. Invariants: a replica is in `_replicas` from before
its process starts until after it has ended; the gateway hears of ready replicas only.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quire_cli.local.console import Console
from quire_cli.local.differences import differences
from quire_cli.local.replica import Replica
from quire_cli.local.scaler import Scaler, initial_replicas
from quire_contract import environment
from quire_contract.model_uri import ModelUriError, Scheme, parse_model_uri
from quire_contract.phases import Phase
from quire_contract.units import parse_quantity
from quire_gateway.backends import Model, StaticBackends
from quire_gateway.demand import DemandTable
from quire_operator.plan.server_arguments import server_arguments
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_server.download.model_source import fetch_model
from quire_server.shared.abandonable import run_abandonable
from quire_server.shared.errors import StartupError

TICK_S = 0.25
LONGEST_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every supervisor of one `quire up` shares."""

    backends: StaticBackends
    demands: DemandTable
    console: Console
    cache: Path
    logs: Path


def restart_delay(failures: int) -> float:
    """Seconds to wait before trying again after so many failures in a row."""
    return 0.0 if failures == 0 else min(LONGEST_BACKOFF_S, 2.0 ** (failures - 1))


def limits_environment(deployment: LLMDeployment) -> dict[str, str]:
    """Return `resources.limits` as a server on this machine reads them; in a pod the kubelet sets cgroups instead."""
    resources = deployment.spec.resources
    limits = {} if resources is None else resources.limits
    variables = {}
    if "cpu" in limits:
        variables[environment.CPU_LIMIT] = str(float(parse_quantity(limits["cpu"])))
    if "memory" in limits:
        variables[environment.MEMORY_LIMIT] = str(int(parse_quantity(limits["memory"])))
    return variables


def _what_runs(deployment: LLMDeployment) -> tuple[object, ...]:
    """Return the part of a manifest that a running replica cannot take a change of."""
    return deployment.spec.model, deployment.spec.engine, deployment.spec.resources


class ModelSupervisor:
    """Runs one LLMDeployment until `stop`. Used on one event loop."""

    def __init__(self, deployment: LLMDeployment, base: Path, surroundings: Surroundings) -> None:
        self._deployment = deployment
        self._base = base
        self._shared = surroundings
        self._scaler = Scaler(deployment, asyncio.get_running_loop().time())
        self._replicas: list[Replica] = []
        self._generation = 0
        self._path: Path | None = None
        self._failures = 0
        self._not_before = 0.0
        self._problem = ""
        self._num_started = 0
        self._wake = asyncio.Event()
        self._stops: set[asyncio.Task[None]] = set()
        self._is_over = False
        self._task = asyncio.create_task(self._run())

    @property
    def deployment(self) -> LLMDeployment:
        return self._deployment

    def update(self, deployment: LLMDeployment) -> None:
        """Take a changed manifest. If what the replicas run has changed, new ones come before the old ones go."""
        before, self._deployment = self._deployment, deployment
        if _what_runs(before) != _what_runs(deployment):
            self._line("changed: new replicas start, then the old ones stop")
            self._generation += 1
            self._failures, self._not_before = 0, 0.0
            if before.spec.model != deployment.spec.model:
                self._path = None
        if before.spec.replicas != deployment.spec.replicas:
            self._scaler.wanted = initial_replicas(deployment)
        self._wake.set()

    async def stop(self) -> None:
        """Forget the model, and end every replica. A successor of the same name may start meanwhile."""
        self._is_over = True
        self._shared.backends.remove(self._key)
        self._shared.demands.forget(self._key)
        self._task.cancel()
        await asyncio.wait([self._task])
        for replica in self._replicas:
            self._begin_stop(replica)
        await asyncio.gather(*self._stops)
        if not self._task.cancelled():
            self._task.result()  # raises what broke it

    def hurry(self) -> None:
        """While stopping: wait no longer for the requests that still run."""
        for replica in self._replicas:
            replica.hurry()

    async def _run(self) -> None:
        for sentence in differences(self._deployment):
            self._line(f"note: {sentence}")
        self._publish()
        while True:
            self._wake.clear()
            loop = asyncio.get_running_loop()
            if self._scaler.update(self._deployment, self._shared.demands[self._key], self._num_ready, loop.time()):
                self._line(f"replicas → {self._scaler.wanted}: {self._scaler.reason}")
            if self._path is None and self._scaler.wanted and loop.time() >= self._not_before:
                await self._fetch()
            await self._reconcile()
            self._publish()
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()

    async def _fetch(self) -> None:
        """Bring the model's files here, or note why that failed and when to try again."""
        model = self._deployment.spec.model
        loop = asyncio.get_running_loop()
        self._publish(Phase.DOWNLOADING)
        if not model.uri.startswith(f"{Scheme.FILE}:"):
            self._line(f"fetching {model.uri}")
        with self._shared.console.bar(f"{self._deployment.name}: fetching") as bar:

            def on_progress(percent: float) -> None:
                loop.call_soon_threadsafe(bar.show, percent)

            try:
                self._path = await run_abandonable(
                    partial(
                        fetch_model,
                        parse_model_uri(model.uri),
                        revision=model.revision,
                        base=self._base,
                        cache=self._shared.cache,
                        on_progress=on_progress,
                    )
                )
            except (StartupError, ModelUriError) as error:
                self._fail(str(error))
                return
        self._problem = ""
        self._line(f"model files at {self._path}")

    async def _reconcile(self) -> None:
        """Start what is missing; stop what is too much, or of an older manifest and no longer needed."""
        running = [r for r in self._replicas if not r.is_stopping]
        current = [r for r in running if r.generation == self._generation]
        stale = [r for r in running if r.generation != self._generation]
        wanted = self._scaler.wanted
        if self._path is not None and asyncio.get_running_loop().time() >= self._not_before:
            for _ in range(wanted - len(current)):
                await self._start_replica(self._path)
        surplus = current[wanted:]
        if sum(r.is_ready for r in current) >= wanted:
            surplus += stale
        for replica in surplus:
            self._begin_stop(replica)

    async def _start_replica(self, path: Path) -> None:
        self._num_started += 1
        name = f"{self._deployment.name}-{self._num_started}"
        try:
            replica = Replica(name, self._generation, self._shared.logs / f"{name}.log", self._on_change)
        except OSError as error:
            self._fail(f"{name} cannot be started: {error}")
            return
        self._replicas.append(replica)
        port = replica.backend.port
        arguments = server_arguments(self._deployment, model=str(path), host=replica.backend.host, port=port)
        arguments += self._deployment.spec.engine.extra_args
        self._line(f"{name} starts on port {port}, log {replica.log}")
        replica.show_progress(self._shared.console.bar(name))
        try:
            await replica.start(arguments, {**limits_environment(self._deployment), **self._deployment.spec.engine.env})
        except OSError as error:
            self._replicas.remove(replica)
            self._fail(f"{name} cannot be started: {error}")

    def _begin_stop(self, replica: Replica) -> None:
        if not replica.is_stopping:
            task = asyncio.create_task(replica.stop(self._deployment.spec.drain.timeout_s))
            self._stops.add(task)
            task.add_done_callback(self._stops.discard)

    def _on_change(self, replica: Replica, before: Phase) -> None:
        if replica.end is not None:
            self._replicas.remove(replica)
            if replica.is_stopping:
                self._line(f"{replica.name} stopped" + (f": {replica.end.describe()}" if replica.end.exit_code else ""))
            else:
                self._fail(f"{replica.name} {replica.end.describe()} (log: {replica.log})")
        elif replica.readiness.phase is not before:
            self._line(f"{replica.name} {replica.readiness.phase}")
            if replica.is_ready:
                self._failures, self._problem = 0, ""
        self._publish()
        self._wake.set()

    def _fail(self, problem: str) -> None:
        self._failures += 1
        delay = restart_delay(self._failures)
        self._not_before = asyncio.get_running_loop().time() + delay
        self._problem = problem
        self._line(f"{problem}; trying again in {delay:.0f} s")

    def _publish(self, phase: Phase | None = None) -> None:
        """Tell the gateway what there is."""
        if self._is_over:
            return
        spec = self._deployment.spec
        loading = max((r for r in self._replicas if not r.is_stopping), key=lambda r: r.progress, default=None)
        readiness = None if loading is None else loading.readiness
        self._shared.backends.set(
            Model(
                namespace=self._deployment.namespace,
                name=self._deployment.name,
                served_names=spec.model.served_names,
                backends=tuple(r.backend for r in self._replicas if r.is_ready),
                phase=phase or (readiness.phase if readiness else Phase.FAILED if self._problem else Phase.STARTING),
                status=self._problem or (readiness.message if readiness else "") or "no replica is ready yet",
                eta_seconds=readiness.eta_seconds if readiness else None,
                is_suspended=spec.suspend,
                cold_start=spec.gateway.cold_start,
                cold_start_timeout_s=spec.scaling.cold_start_timeout_s,
                max_queue=spec.gateway.max_queue,
                heartbeat_s=spec.gateway.heartbeat_s,
            )
        )

    @property
    def _num_ready(self) -> int:
        return sum(r.is_ready for r in self._replicas)

    @property
    def _key(self) -> str:
        return f"{self._deployment.namespace}/{self._deployment.name}"

    def _line(self, text: str) -> None:
        self._shared.console.line(self._deployment.name, text)
