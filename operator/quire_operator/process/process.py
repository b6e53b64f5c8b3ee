"""The operator process: its endpoints, its signals, its lease, and one term after the other.

Knows how the parts live and die, and nothing of what they decide. Invariants: SIGTERM ends it within `STOP_TIMEOUT_S`,
the lease given back; it never works without the lease, and exits with 1 if its work cannot be stopped in time.
"""

import asyncio
import contextlib
import logging
import os
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quire_contract import names
from quire_kube.client import KubeClient
from quire_kube.connection import load_connection
from quire_operator.process.health import Health, build_health_app, build_metrics_app, serving
from quire_operator.process.lease import Leadership, LeaseConfig, WorkDidNotStopError
from quire_operator.process.metrics import Metrics, Readings
from quire_operator.process.settings_file import SettingsFile
from quire_operator.process.term import Surroundings, Term
from quire_operator.spec.kinds import ref_of

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 8.0
_TERM_RESTART_S: Final = 1.0
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorOptions:
    """What the command line says."""

    config: Path | None
    health_port: int
    metrics_port: int
    lease_namespace: str
    identity: str
    has_leader_election: bool
    lease_duration_s: float
    num_workers: int


def own_namespace() -> str:
    """Return the namespace that this process runs in; outside of a cluster, the one that charts install to."""
    if name := os.environ.get("POD_NAMESPACE"):
        return name
    with contextlib.suppress(OSError):
        if name := _NAMESPACE_FILE.read_text().strip():
            return name
    return names.SYSTEM_NAMESPACE


class OperatorProcess:
    """One process; made inside the event loop and run once."""

    def __init__(self, options: OperatorOptions, settings: SettingsFile) -> None:
        self._options = options
        self._settings = settings
        self._stop_wanted = asyncio.Event()
        self._metrics = Metrics(self._readings)
        self._is_leader = False
        self._term: Term | None = None

    async def run(self) -> int:
        """Run until told to stop; return the exit code.

        Raises:
            OSError: a port is taken.
            ConnectionSettingsError: nothing says where the API server is.
        """
        self._take_signals()
        async with AsyncExitStack() as stack:
            health_app, metrics_app = build_health_app(self._health), build_metrics_app(self._metrics.render)
            health = await stack.enter_async_context(serving(health_app, self._options.health_port))
            metrics = await stack.enter_async_context(serving(metrics_app, self._options.metrics_port))
            logger.info("Health at port %d, metrics at port %d", health, metrics)
            await load_connection()  # said now rather than at each request, if there is none
            client = KubeClient(load_connection, ref_of, self._metrics.count_api_call)
            kube = await stack.enter_async_context(client)
            around = Surroundings(
                kube=kube,
                connect=load_connection,
                settings=self._settings,
                metrics=self._metrics,
                operator_namespace=self._options.lease_namespace,
                num_workers=self._options.num_workers,
                on_signals_lost=self._take_signals,
            )
            return await self._work_until_stopped(around)

    async def _work_until_stopped(self, around: Surroundings) -> int:
        if self._options.has_leader_election:
            config = LeaseConfig(
                namespace=self._options.lease_namespace,
                name=names.OPERATOR_LEASE,
                identity=self._options.identity,
                duration_s=self._options.lease_duration_s,
            )
            leadership = Leadership(around.kube, config, self._leader_changed)
            working = asyncio.ensure_future(leadership.run(lambda: self._run_terms(around)))
        else:
            self._leader_changed(True)
            working = asyncio.ensure_future(self._run_terms(around))
        stopping = asyncio.ensure_future(self._stop_wanted.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not working.done():
            logger.info("Stopping")
            working.cancel()
            await asyncio.wait({working}, timeout=STOP_TIMEOUT_S)
        return _exit_code(working)

    async def _run_terms(self, around: Surroundings) -> None:
        while True:
            self._settings.reload()
            self._term = Term(around)
            try:
                await self._term.run()
            finally:
                self._term = None
            await asyncio.sleep(_TERM_RESTART_S)

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_wanted.set)

    def _leader_changed(self, is_leader: bool) -> None:
        self._is_leader = is_leader

    def _health(self) -> Health:
        return self._term.health() if self._term is not None else Health(is_leader=self._is_leader)

    def _readings(self) -> Readings:
        return self._term.readings() if self._term is not None else Readings(is_leader=self._is_leader)


def _exit_code(working: "asyncio.Future[None]") -> int:
    if not working.done():
        logger.error("Work did not stop within %g s", STOP_TIMEOUT_S)
        return 1
    if working.cancelled():
        return 0
    error = working.exception()
    if isinstance(error, WorkDidNotStopError):
        logger.error("Lost the lease and %s", error)
    elif error is not None:
        logger.error("Work failed", exc_info=error)
    return 0 if error is None else 1
