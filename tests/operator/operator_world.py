"""A whole operator less its process: FakeKube, store, reconciler, and a watch that may lag."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fake_controllers
from fake_kube import FakeKube, make_llm

from quire_contract.model_facts import DownloadProgress
from quire_contract.phases import Readiness
from quire_kube.api import KubeError
from quire_kube.objects import Key, Manifest, Ref
from quire_kube.times import parse_time
from quire_operator.process.reconcile import Reconciler
from quire_operator.spec.kinds import EVENT, LLM_DEPLOYMENT
from quire_operator.spec.settings import Settings
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.store import Store

MAX_TURNS = 60
WatchEvent = tuple[str, Manifest]


class FakeProber:
    """Answers what it was told to; remembers whom it asked."""

    def __init__(self) -> None:
        self.readiness: dict[str, Readiness] = {}
        self.loads: dict[str, int] = {}
        self.progress: DownloadProgress | None = None
        self.asked_loads: list[str] = []

    async def fetch_readiness(self, pods: Sequence[Manifest]) -> Mapping[str, Readiness]:
        return {name: self.readiness[name] for name in names_of(pods) if name in self.readiness}

    async def fetch_loads(self, pods: Sequence[Manifest]) -> Mapping[str, int]:
        self.asked_loads += names_of(pods)
        return {name: self.loads.get(name, 0) for name in names_of(pods)}

    async def fetch_progress(self, pod: Manifest) -> DownloadProgress | None:
        return self.progress


class World:
    """Runs reconciles for whatever the store says has changed."""

    def __init__(self) -> None:
        self.kube = FakeKube()
        self.prober = FakeProber()
        self.pending: set[Key] = set()
        self.now = parse_time(self.kube.now_text) or 0.0
        self.store = Store(self.pending.update)
        self.errors: list[KubeError] = []
        self._num_seen = 0
        self.reconciler = Reconciler(
            kube=self.kube,
            store=self.store,
            cluster=lambda: ClusterFacts(has_default_storage_class=True, expandable_storage_classes=frozenset()),
            settings=Settings,
            prober=self.prober,
            clock=lambda: self.now,
        )

    def restart_operator(self) -> None:
        """Forget everything; the watch begins with a listing."""
        self.pending.clear()
        self.store = Store(self.pending.update)
        self.reconciler = dataclasses.replace(self.reconciler, store=self.store)
        for ref, manifest in self.kube.objects.items():
            if ref.kind != EVENT:
                self.store.put(manifest)
        self._num_seen = len(self.kube.events)

    def deliver(self, order: Callable[[list[WatchEvent]], list[WatchEvent]] = list) -> int:
        """Let the watch bring everything that has happened, in order or in another."""
        news = order(self.kube.events[self._num_seen :])
        self._num_seen = len(self.kube.events)
        for event, manifest in news:
            if manifest["kind"] != EVENT.kind:
                (self.store.remove if event == "DELETED" else self.store.put)(manifest)
        return len(news)

    async def run_pending(self) -> None:
        """Reconcile what has changed; what fails is tried again in the next turn, as the queue would."""
        keys, failed = sorted(self.pending), set()
        self.pending.clear()
        for key in keys:
            try:
                await self.reconciler.reconcile(key)
            except KubeError as error:
                self.errors.append(error)
                failed.add(key)
        self.pending.update(failed)

    async def settle(self, *, with_controllers: bool = True) -> None:
        """Run operator, watch and controllers until nothing moves."""
        for _ in range(MAX_TURNS):
            moved = self.deliver() > 0 or bool(self.pending)
            await self.run_pending()
            if with_controllers:
                moved |= fake_controllers.step(self.kube)
            if not moved and not self.pending:
                return
        raise AssertionError(f"not settled: pending {self.pending}, last calls {self.kube.calls[-12:]}")

    def llm(self, name: str = "smollm2") -> Manifest:
        return self.kube.objects[Ref(kind=LLM_DEPLOYMENT, namespace="default", name=name)]

    def condition(self, kind: str, name: str = "smollm2") -> Manifest:
        conditions: Sequence[Manifest] = self.llm(name)["status"]["conditions"]
        return next(condition for condition in conditions if condition["type"] == kind)


async def settled_world(**spec: Any) -> World:
    """A world in which one model serves, and nothing has been asked of the API server since."""
    world = World()
    world.kube.put(make_llm(**spec))
    await world.settle()
    assert world.condition("Ready")["status"] == "True"
    world.kube.calls.clear()
    return world


def names_of(manifests: Sequence[Manifest]) -> list[str]:
    return [manifest["metadata"]["name"] for manifest in manifests]
