"""One term of a leader: from winning the lease to losing it, or until the namespaces to work in change.

Wires discovery, watches, store, queue, reconciler, probes and settings together; decides nothing. A term starts with an
empty store, reconciles nothing before the store holds everything there is, and leaves nothing behind.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from quire_kube.api import Kube, KubeError
from quire_kube.login import Connect
from quire_kube.objects import Key, Kind, Manifest
from quire_operator.process.health import Health
from quire_operator.process.metrics import Metrics, Readings
from quire_operator.process.queue import WorkQueue
from quire_operator.process.reconcile import Reconciler
from quire_operator.process.settings_file import SettingsFile
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.discovery import Discovery, discover
from quire_operator.watch.kopf_watch.handlers import StoreFeed, Watches, watched_kinds
from quire_operator.watch.pod_probe import POLL_INTERVAL_S, PodProbe, ProbeLoop
from quire_operator.watch.store import Store

logger = logging.getLogger(__name__)

RESYNC_INTERVAL_S: Final = 600.0
RESYNC_SPREAD_S: Final = 60.0
DISCOVERY_INTERVAL_S: Final = 60.0
DISCOVERY_RETRY_S: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What outlives a term."""

    kube: Kube
    connect: Connect
    """How kopf reaches the API server; asked again whenever the credentials are refused."""
    settings: SettingsFile
    metrics: Metrics
    operator_namespace: str
    num_workers: int
    on_signals_lost: Callable[[], None]
    """Called whenever kopf has taken the process's signals for itself."""


class Term:
    """One term; made inside the event loop and run once."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._namespaces = around.settings.current.namespaces
        self._namespaces_changed = asyncio.Event()
        self._facts = ClusterFacts(operator_namespace=around.operator_namespace)
        self._store = Store(self._add)
        self._queue: WorkQueue[Key] = WorkQueue(
            self._work, num_workers=around.num_workers, on_error=_log_failed_reconcile
        )
        self._probe = PodProbe()
        self._probe_loop = ProbeLoop(self._probe, self._enqueue_for, POLL_INTERVAL_S)
        feed = StoreFeed(store=self._store, on_pod=self._probe_loop.saw_pod)
        self._watches = Watches(feed, around.connect, around.metrics.count_api_call, self._namespaces)
        self._reconciler = Reconciler(
            kube=around.kube,
            store=self._store,
            cluster=lambda: self._facts,
            settings=lambda: around.settings.current,
            prober=self._probe,
            clock=time.time,
        )

    async def run(self) -> None:
        """Work until cancelled, or until other namespaces are wanted."""
        jobs = (
            self._namespaces_changed.wait(),
            self._watches.run(self._around.on_signals_lost),
            self._keep_discovering(),
            self._keep_working(),
            self._probe_loop.run(),
            self._keep_resyncing(),
            self._around.settings.watch(self._settings_changed),
        )
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._probe.close()

    def health(self) -> Health:
        """Return how the term is."""
        ages = [(stream.kind.plural, age_s) for stream, age_s in self._watches.ages_s()]
        return Health(
            is_leader=True,
            is_synced=self._watches.has_synced,
            oldest_watch=max(ages, key=lambda age: age[1], default=None),
            queue_age_s=self._queue.age_s if self._watches.has_synced else 0.0,
        )

    def readings(self) -> Readings:
        """Return what the metrics say of the term."""
        keys = self._store.keys()
        manifests = (self._store.llm(key) for key in keys)
        return Readings(
            is_leader=True,
            queue_depth=self._queue.depth,
            queue_age_s=max(self._queue.age_s, 0.0),
            watch_ages_s=tuple((stream.kind.plural, age_s) for stream, age_s in self._watches.ages_s()),
            phases=tuple(_phase(manifest) for manifest in manifests if manifest is not None),
        )

    async def _work(self, key: Key) -> float | None:
        started_at = time.monotonic()
        result = "cancelled"
        try:
            again_s = await self._reconciler.reconcile(key)
            result = "ok"
            return again_s
        except Exception as error:
            result = type(error).__name__
            raise
        finally:
            self._around.metrics.count_reconcile(result, time.monotonic() - started_at)

    async def _keep_working(self) -> None:
        await self._watches.wait_synced()
        await self._queue.run()

    async def _keep_resyncing(self) -> None:
        """Look at every key again now and then: it costs nothing where nothing has changed."""
        while True:
            await asyncio.sleep(RESYNC_INTERVAL_S * random.uniform(0.9, 1.1))
            keys = self._store.keys()
            for key in keys:
                self._queue.add_after(key, random.uniform(0.0, RESYNC_SPREAD_S))

    async def _keep_discovering(self) -> None:
        has_crd: bool | None = None
        while True:
            self._watches.ended.clear()
            try:
                found = await discover(self._around.kube, self._around.operator_namespace)
            except KubeError as error:
                logger.warning("Cannot discover the cluster's APIs err=%s", error)
                await asyncio.sleep(DISCOVERY_RETRY_S)
                continue
            self._take_discovery(found)
            if found.has_crd != has_crd and not found.has_crd:
                logger.warning("The cluster has no LLMDeployments yet: apply crds/llmdeployment.yaml")
            has_crd = found.has_crd
            try:
                async with asyncio.timeout(DISCOVERY_INTERVAL_S if has_crd else DISCOVERY_RETRY_S):
                    await self._watches.ended.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(DISCOVERY_RETRY_S)

    def _take_discovery(self, found: Discovery) -> None:
        self._watches.set_kinds(watched_kinds(found.facts.kinds) if found.has_crd else frozenset())
        if found.facts == self._facts:
            return
        gone, new = self._facts.kinds - found.facts.kinds, found.facts.kinds - self._facts.kinds
        self._facts = found.facts
        logger.info(
            "Discovered the cluster version=%d.%d optional_apis=%s new=%s gone=%s default_storage_class=%s",
            *found.facts.version,
            _list_kinds(found.facts.kinds),
            _list_kinds(new),
            _list_kinds(gone),
            found.facts.has_default_storage_class,
        )
        self._enqueue_all()

    def _settings_changed(self) -> None:
        if self._around.settings.current.namespaces != self._namespaces:
            logger.info("Namespaces changed, starting anew")
            self._namespaces_changed.set()
        self._enqueue_all()

    def _enqueue_all(self) -> None:
        self._add(self._store.keys())

    def _enqueue_for(self, manifest: Manifest) -> None:
        self._add(self._store.keys_for(manifest))

    def _add(self, keys: frozenset[Key]) -> None:
        for key in keys:
            self._queue.add(key)


def _log_failed_reconcile(key: Key, error: Exception, delay_s: float) -> None:
    is_expected = isinstance(error, KubeError)
    logger.warning(
        "Reconcile failed llmdeployment=%s err=%s retry_in=%.0fs",
        key,
        error if is_expected else repr(error),
        delay_s,
        exc_info=None if is_expected else error,
    )


def _list_kinds(kinds: frozenset[Kind]) -> str:
    return ",".join(sorted(kind.kind for kind in kinds)) or "none"


def _phase(manifest: Manifest) -> str:
    return str((manifest.get("status") or {}).get("phase") or "Unknown")
