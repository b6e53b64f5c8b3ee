"""kopf against an API server over HTTP: what it hears ends in the store, and it never writes."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_api_server import CORE_KINDS, FakeApiServer

from quire_contract import names
from quire_kube.connection import Connection, Endpoint
from quire_kube.objects import Key, Kind, Ref
from quire_operator.process.lease import MIN_STOP_S
from quire_operator.spec.kinds import LLM_DEPLOYMENT, PERSISTENT_VOLUME_CLAIM, POD, SERVICE, SERVICE_MONITOR
from quire_operator.watch.kopf_watch import handlers
from quire_operator.watch.kopf_watch.handlers import (
    KOPF_GRACE_S,
    StoreFeed,
    Watches,
    build_kopf_settings,
    build_registry,
    watched_kinds,
)
from quire_operator.watch.kopf_watch.task_family import TaskFamily
from quire_operator.watch.kopf_watch.watch_state import WatchState
from quire_operator.watch.store import Store

OURS = {names.LABEL_NAME: names.APP_NAME}


def make(kind: Kind, name: str, labels: dict[str, str] | None = None, namespace: str = "ns") -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "labels": labels or {}}
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": {"model": {}}}


def ref(kind: Kind, name: str, namespace: str = "ns") -> Ref:
    return Ref(kind=kind, namespace=namespace, name=name)


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


class World:
    """A server, a store, and watches between them."""

    def __init__(self, server: FakeApiServer, namespaces: tuple[str, ...] = ()) -> None:
        self.server = server
        self.changed: list[Key] = []
        self.pods: list[tuple[str, str]] = []
        self.calls: list[tuple[str, str, int]] = []
        self.num_signals_lost = 0
        self.store = Store(self.changed.extend)
        feed = StoreFeed(store=self.store, on_pod=lambda kind, pod: self.pods.append((kind, pod["metadata"]["name"])))
        self.watches = Watches(
            feed,
            self.connect,
            lambda verb, kind, code: self.calls.append((verb, kind, code)),
            namespaces,
        )

    def has(self, kind: Kind, name: str) -> bool:
        return self.store.get(ref(kind, name)) is not None

    async def connect(self) -> Connection:
        return Connection(endpoint=Endpoint(server=self.server.url))

    def lose_signals(self) -> None:
        self.num_signals_lost += 1

    @asynccontextmanager
    async def watching(self, *kinds: Kind) -> AsyncIterator[None]:
        self.watches.set_kinds(watched_kinds(kinds))
        task = asyncio.ensure_future(self.watches.run(self.lose_signals))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def play(scenario: Callable[[FakeApiServer], Any], *kinds: Kind) -> None:
    async def main() -> None:
        server = FakeApiServer({*CORE_KINDS, *kinds})
        async with server.running():
            await scenario(server)
        assert server.writes == []

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _quiet_kopf() -> None:
    logging.getLogger("kopf").setLevel(logging.CRITICAL)


def test_nothing_is_decided_before_everything_listed_is_in_the_store() -> None:
    async def scenario(server: FakeApiServer) -> None:
        for i in range(700):  # two pages
            server.put(make(LLM_DEPLOYMENT, f"llm-{i}"))
            server.put(make(SERVICE, f"llm-{i}", OURS))
        server.page_delay_s = 0.05
        world = World(server)
        async with world.watching():
            await asyncio.wait_for(world.watches.wait_synced(), 30)
            assert len(world.store.keys()) == 700
            assert len(world.store.versions(SERVICE)) == 700
            assert all(not stream.namespace for stream, _ in world.watches.ages_s())

    play(scenario)


def test_empty_cluster_is_synced_too() -> None:
    async def scenario(server: FakeApiServer) -> None:
        world = World(server)
        async with world.watching():
            await asyncio.wait_for(world.watches.wait_synced(), 20)
            assert world.num_signals_lost == 1

    play(scenario)


def test_events_reach_the_store_and_name_the_keys() -> None:
    async def scenario(server: FakeApiServer) -> None:
        world = World(server)
        async with world.watching():
            await world.watches.wait_synced()
            await until(lambda: server.num_watches == len(watched_kinds(())))
            llm = server.put(make(LLM_DEPLOYMENT, "a"))
            await until(lambda: world.has(LLM_DEPLOYMENT, "a"))
            assert world.changed == [Key(namespace="ns", name="a")]
            service = server.put(make(SERVICE, "a", {**OURS, names.LABEL_DEPLOYMENT: "a"}))
            await until(lambda: world.has(SERVICE, "a"))
            server.delete(service)
            await until(lambda: not world.has(SERVICE, "a"))
            assert world.changed == [Key(namespace="ns", name="a")] * 3
            server.delete(llm)
            await until(lambda: not world.store.keys())

    play(scenario)


def test_pods_of_others_are_not_even_asked_for() -> None:
    async def scenario(server: FakeApiServer) -> None:
        server.put(make(POD, "other"))
        server.put(make(PERSISTENT_VOLUME_CLAIM, "of-a-user"))
        server.put(make(POD, "ours", {**OURS, names.LABEL_DEPLOYMENT: "a"}))
        world = World(server)
        async with world.watching():
            await world.watches.wait_synced()
            assert world.pods == [("", "ours")]
            assert world.has(PERSISTENT_VOLUME_CLAIM, "of-a-user")
            queries = [query for _, path, query in server.requests if path == "/api/v1/pods"]
            assert all(query["labelSelector"] == "app.kubernetes.io/name=quire" for query in queries)

    play(scenario)


def test_child_that_loses_our_label_and_gets_it_back_is_there_again() -> None:
    async def scenario(server: FakeApiServer) -> None:
        world = World(server)
        async with world.watching():
            await world.watches.wait_synced()
            await until(lambda: server.num_watches == len(watched_kinds(())))
            service = server.put(make(SERVICE, "a", OURS))
            await until(lambda: world.has(SERVICE, "a"))
            server.put({**service, "metadata": {**service["metadata"], "labels": {}}})
            await until(lambda: not world.has(SERVICE, "a"))
            server.put(service)
            await until(lambda: world.has(SERVICE, "a"))

    play(scenario)


def test_what_went_while_the_watch_was_broken_leaves_the_store() -> None:
    async def scenario(server: FakeApiServer) -> None:
        gone, kept = (server.put(make(SERVICE, name, OURS)) for name in ("gone", "kept"))
        world = World(server)
        async with world.watching():
            await world.watches.wait_synced()
            await until(lambda: server.num_watches == len(watched_kinds(())))
            server.delete(gone, is_told=False)
            server.expire_watches()
            await until(lambda: not world.has(SERVICE, "gone"))
            assert world.has(SERVICE, kept["metadata"]["name"])

    play(scenario)


def test_own_write_that_is_newer_than_a_listing_survives_it() -> None:
    async def scenario(server: FakeApiServer) -> None:
        world = World(server)
        async with world.watching():
            await world.watches.wait_synced()
            written = make(SERVICE, "new", OURS)
            written["metadata"] |= {"uid": "u", "resourceVersion": "999999"}
            world.store.put(written)
            await until(lambda: server.num_watches == len(watched_kinds(())))
            num_lists = sum(path == "/api/v1/services" for _, path, _ in server.requests)
            server.expire_watches()
            await until(lambda: sum(path == "/api/v1/services" for _, path, _ in server.requests) >= num_lists + 2)
            assert world.has(SERVICE, "new")

    play(scenario)


def test_optional_kinds_come_and_go() -> None:
    async def scenario(server: FakeApiServer) -> None:
        world = World(server)
        async with world.watching():
            await world.watches.wait_synced()
            server.kinds.add(SERVICE_MONITOR)
            server.put(make(SERVICE_MONITOR, "a", OURS))
            world.watches.set_kinds(watched_kinds([SERVICE_MONITOR]))
            await until(lambda: world.has(SERVICE_MONITOR, "a"))
            world.watches.set_kinds(watched_kinds([]))
            await until(lambda: not world.has(SERVICE_MONITOR, "a"))
            assert world.num_signals_lost >= 2

    play(scenario)


def test_nothing_ages_while_nothing_is_to_be_watched() -> None:
    """The CustomResourceDefinition is gone: that is no watch that stands still."""

    async def scenario(server: FakeApiServer) -> None:
        world = World(server)
        async with world.watching():
            await world.watches.wait_synced()
            assert list(world.watches.ages_s())
            world.watches.set_kinds(frozenset())
            await until(lambda: not list(world.watches.ages_s()))
            server.put(make(LLM_DEPLOYMENT, "a"))
            world.watches.set_kinds(watched_kinds([]))
            await until(lambda: world.has(LLM_DEPLOYMENT, "a"))
            assert list(world.watches.ages_s())

    play(scenario)


def test_namespaces_are_watched_one_by_one() -> None:
    async def scenario(server: FakeApiServer) -> None:
        for namespace in ("one", "two", "three"):
            server.put(make(LLM_DEPLOYMENT, "a", namespace=namespace))
        world = World(server, namespaces=("one", "two"))
        async with world.watching():
            await world.watches.wait_synced()
            keys = world.store.keys()
            assert {key.namespace for key in keys} == {"one", "two"}
            listed = {path for _, path, _ in server.requests if path.endswith("/llmdeployments")}
            assert listed == {f"/apis/quire.dev/v1alpha1/namespaces/{name}/llmdeployments" for name in ("one", "two")}

    play(scenario)


def test_failing_server_is_waited_for() -> None:
    async def scenario(server: FakeApiServer) -> None:
        server.put(make(LLM_DEPLOYMENT, "a"))
        server.is_failing = True
        world = World(server)
        async with world.watching():
            await until(lambda: len(server.requests) > 3)
            server.is_failing = False
            await asyncio.wait_for(world.watches.wait_synced(), 30)
            assert world.has(LLM_DEPLOYMENT, "a")

    play(scenario)


def test_watches_that_cannot_be_start_anew_and_leave_nothing_behind() -> None:
    """kopf ends when one of its watches is refused for good, and leaves the others running."""

    async def scenario(server: FakeApiServer) -> None:
        server.put(make(LLM_DEPLOYMENT, "a"))
        server.gone_paths.add("/api/v1/pods")
        world = World(server)
        async with world.watching():
            await until(lambda: world.num_signals_lost >= 3)
            server.gone_paths.clear()
            await asyncio.wait_for(world.watches.wait_synced(), 30)
            await until(lambda: server.num_watches == len(watched_kinds(())))
            assert world.has(LLM_DEPLOYMENT, "a")
            assert world.watches.ended.is_set()
        await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name().startswith("watcher")])

    play(scenario)


def test_bookmarks_are_a_sign_of_life() -> None:
    async def scenario(server: FakeApiServer) -> None:
        world = World(server)
        async with world.watching():
            await world.watches.wait_synced()
            await until(lambda: server.num_watches == len(watched_kinds(())))
            await until(lambda: min(age_s for _, age_s in world.watches.ages_s()) > 0.3)
            before = time.monotonic()
            server.bookmark()
            await until(lambda: max(age_s for _, age_s in world.watches.ages_s()) < time.monotonic() - before)
            assert ("watch", "pods", 200) in world.calls

    play(scenario)


def test_watches_with_work_at_hand_end_all_that_they_have_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their own order, so that at the end of a lease nothing is left that takes time to end."""
    left: list[str] = []

    class Family(TaskFamily):
        async def end(self, timeout_s: float) -> int:
            left.extend(task.get_name() for task in self._alive())
            return await super().end(timeout_s)

    monkeypatch.setattr(handlers, "TaskFamily", Family)
    monkeypatch.setattr(handlers, "KOPF_GRACE_S", 30.0)

    async def scenario(server: FakeApiServer) -> None:
        world = World(server)
        async with world.watching():
            await world.watches.wait_synced()
            await until(lambda: server.num_watches == len(watched_kinds(())))
            for i in range(300):
                server.put(make(SERVICE, str(i), OURS))
            await until(lambda: world.has(SERVICE, "0"))

    play(scenario)
    assert all(name.startswith("pause-waiter") for name in left), left  # these kopf forgets; they end at once


def test_kopf_has_no_handler_that_would_write() -> None:
    """A finalizer or an annotation comes only with handlers of these registries."""
    kinds = watched_kinds(())
    feed = StoreFeed(store=Store(), on_pod=lambda kind, pod: None)

    async def login(**_: Any) -> None: ...

    registry = build_registry(kinds, feed, login, WatchState([], lambda *_: None, 0.0))
    assert not list(registry._changing.get_all_handlers())
    assert not list(registry._spawning.get_all_handlers())
    assert len(list(registry._watching.get_all_handlers())) == len(kinds)
    settings = build_kopf_settings(kinds)
    assert not settings.posting.enabled
    assert settings.scanning.disabled
    assert settings.process.ultimate_exiting_timeout is None
    assert settings.queueing.exit_timeout < KOPF_GRACE_S < MIN_STOP_S
