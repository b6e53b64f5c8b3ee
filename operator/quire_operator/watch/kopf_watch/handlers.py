"""kopf's part: it lists and watches, and its one handler puts what it hears into the store and names the keys.

Knows no plan. Nothing is ever written: only `on.event` handlers are registered, so kopf adds no finalizer and no
annotation, and its storages are empty besides. kopf does not look for new kinds or namespaces (that would need rights
on CustomResourceDefinitions and Namespaces): `discovery.py` does, and the watches are started anew with other kinds.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import kopf

from quire_contract import names
from quire_kube.login import Connect
from quire_kube.objects import Kind, Manifest
from quire_operator.spec.kinds import (
    LLM_DEPLOYMENT,
    OPTIONAL_KINDS,
    OWNED_KINDS,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SHARED_KINDS,
)
from quire_operator.watch.kopf_watch.task_family import TaskFamily
from quire_operator.watch.kopf_watch.watch_session import CountCall, build_session
from quire_operator.watch.kopf_watch.watch_state import Stream, WatchState
from quire_operator.watch.store import Store

logger = logging.getLogger(__name__)

WATCHED_KINDS: Final = (LLM_DEPLOYMENT, POD, *OWNED_KINDS, *SHARED_KINDS)
_ALWAYS_WATCHED: Final = frozenset(WATCHED_KINDS) - frozenset(OPTIONAL_KINDS)
_OURS: Final = f"{names.LABEL_NAME}={names.APP_NAME}"
_UNFILTERED_KINDS: Final = frozenset({LLM_DEPLOYMENT, PERSISTENT_VOLUME_CLAIM})
"""Users write LLMDeployments, and claims that LLMDeployments name; all else is watched by our label."""

_SERVER_TIMEOUT_S: Final = 300
_INACTIVITY_TIMEOUT_S: Final = 90.0
"""The API server sends a bookmark a minute or so apart; silence for longer is a dead connection."""
_PAGE_SIZE: Final = 100
"""Objects in a page of a listing. What the pages of all kinds take at once is memory that is never given back."""
_RETRIES_S: Final = (0.2, 0.5, 1, *(2,) * 60)
_WORKER_LIMIT: Final = 100
_MIN_LOGIN_PAUSE_S: Final = 2.0
_EVERY_VERSION: Final = 2**63
_RESTART_PAUSE_S: Final = 0.5
KOPF_GRACE_S: Final = 0.4
"""Less than `lease.MIN_STOP_S`: who has hung until his lease has expired must be out of the way, or end the process."""
_KOPF_STOP_TIMEOUT_S: Final = 5.0


def watched_kinds(optional: Collection[Kind]) -> frozenset[Kind]:
    """Return what to watch, given which of `OPTIONAL_KINDS` the cluster has."""
    return _ALWAYS_WATCHED | frozenset(optional)


def build_streams(kinds: Collection[Kind], namespaces: Collection[str]) -> tuple[Stream, ...]:
    """Return the watches for these kinds in these namespaces (none: in all)."""
    return tuple(Stream(kind=kind, namespace=namespace) for kind in sorted(kinds) for namespace in namespaces or ("",))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFeed:
    """Puts what the watches bring into the store, which tells whom it concerns."""

    store: Store
    on_pod: Callable[[str, Manifest], None]
    """Told of each of our pods' events, by type; whoever asks pods needs to know which there are."""

    def take(self, event_type: str | None, manifest: Manifest) -> None:
        """Take one event in; its type is kopf's: None for what was listed."""
        if manifest["kind"] == POD.kind:
            self.on_pod(event_type or "", manifest)
        if event_type == "DELETED":
            self.store.remove(manifest)
        else:
            self.store.put(manifest)

    def prune(self, stream: Stream, uids: frozenset[str], version: int) -> None:
        """Drop what a listing no longer has: it went while nobody watched, and no event tells of it."""
        for ref, (uid, known_version) in self.store.versions(stream.kind).items():
            is_covered = stream.namespace in ("", ref.namespace) and known_version <= version
            if uid in uids or not is_covered:
                continue
            manifest = self.store.get(ref)
            if manifest is not None:
                logger.info("Missed a deletion object=%s uid=%s", ref, uid)
                self.take("DELETED", manifest)


class Watches:
    """Runs kopf over a set of kinds, and starts it anew whenever it ends or other kinds are wanted.

    Args:
        feed: where events go.
        connect: returns how to reach the API server; asked again whenever the credentials are refused.
        count_call: told of each answer of the API server.
        namespaces: where to watch; none: everywhere.
    """

    def __init__(
        self,
        feed: StoreFeed,
        connect: Connect,
        count_call: CountCall,
        namespaces: Collection[str],
    ) -> None:
        self._feed = feed
        self._connect = connect
        self._count_call = count_call
        self._namespaces = tuple(namespaces)
        self._kinds: frozenset[Kind] = frozenset()
        self._kinds_changed = asyncio.Event()
        self._state: WatchState | None = None
        self._first_synced = asyncio.Event()
        self.ended = asyncio.Event()
        """Set whenever kopf has ended: perhaps a kind is gone, which is worth a look."""

    def set_kinds(self, kinds: frozenset[Kind]) -> None:
        """Watch these kinds from now on."""
        if kinds != self._kinds:
            self._kinds = kinds
            self._kinds_changed.set()

    async def wait_synced(self) -> None:
        """Wait until the store holds everything there was when the watches began."""
        await self._first_synced.wait()

    @property
    def has_synced(self) -> bool:
        return self._first_synced.is_set()

    def ages_s(self) -> Iterator[tuple[Stream, float]]:
        """Yield for how long each watch has shown no life."""
        return self._state.ages_s(time.monotonic()) if self._state is not None else iter(())

    async def run(self, on_signals_lost: Callable[[], None]) -> None:
        """Watch until cancelled.

        Args:
            on_signals_lost: called each time kopf has taken the process's signals for itself.
        """
        while True:
            self._kinds_changed.clear()
            if not self._kinds:
                self._state = None  # watches that nobody wants do not age
                await self._kinds_changed.wait()
                continue
            streams = build_streams(self._kinds, self._namespaces)
            self._state = state = WatchState(streams, self._feed.prune, time.monotonic())
            async with AsyncExitStack() as sessions:
                login = self._build_login(state, sessions)
                await _first_of(
                    _run_kopf(self._kinds, self._namespaces, self._feed, login, state, on_signals_lost),
                    self._kinds_changed.wait(),
                    self._announce_sync(state),
                )
            for kind in set(WATCHED_KINDS) - self._kinds:
                self._feed.prune(Stream(kind=kind), frozenset(), _EVERY_VERSION)
            self.ended.set()
            await asyncio.sleep(_RESTART_PAUSE_S)

    async def _announce_sync(self, state: WatchState) -> None:
        await state.wait_synced()
        self._first_synced.set()
        logger.info("Watches are synced kinds=%d objects=%d", len(self._kinds), len(self._feed.store))
        await asyncio.Event().wait()

    def _build_login(self, state: WatchState, sessions: AsyncExitStack) -> Callable[..., Any]:
        last_at = float("-inf")

        async def login(**_: Any) -> kopf.AiohttpSession:
            nonlocal last_at
            await asyncio.sleep(max(0.0, last_at + _MIN_LOGIN_PAUSE_S - time.monotonic()))
            last_at = time.monotonic()
            await sessions.aclose()  # the one whose credentials were refused
            connection = await self._connect()
            session = build_session(connection, state, self._count_call)
            sessions.push_async_callback(session.close)  # kopf closes it too, unless it is stopped while it starts
            return kopf.AiohttpSession(server=connection.endpoint.server, aiohttp_session=session)

        return login


async def _first_of(*coroutines: Any) -> None:
    """Run all until the first ends; an error of kopf's is logged, for the watches are to start anew."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            logger.warning("Watches ended and start anew err=%r", result)


async def _run_kopf(
    kinds: Collection[Kind],
    namespaces: Collection[str],
    feed: StoreFeed,
    login: Callable[..., Any],
    state: WatchState,
    on_signals_lost: Callable[[], None],
) -> None:
    family = TaskFamily()
    family.adopt()
    # Not kopf.run_tasks: in the end that cancels every task of the process that is younger than kopf.
    root_tasks: Collection[asyncio.Task[Any]] = ()
    try:
        root_tasks = await kopf.spawn_tasks(
            registry=build_registry(kinds, feed, login, state),
            settings=build_kopf_settings(kinds),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
        )
        on_signals_lost()
        done, _ = await asyncio.wait(root_tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in root_tasks:
            task.cancel()
        if root_tasks:  # they end what they have started, in an order that cancelling all at once would upset
            await asyncio.wait(root_tasks, timeout=KOPF_GRACE_S)
        num_left = await family.end(_KOPF_STOP_TIMEOUT_S)
        if num_left:
            logger.error("Tasks of the watches do not end count=%d", num_left)


def build_registry(
    kinds: Collection[Kind], feed: StoreFeed, login: Callable[..., Any], state: WatchState
) -> kopf.OperatorRegistry:
    """Return kopf's handlers: one per kind, and the login."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry, id="login", errors=kopf.ErrorsMode.TEMPORARY, backoff=_MIN_LOGIN_PAUSE_S)(login)
    for kind in sorted(kinds):

        async def on_event(event: Mapping[str, Any], kind: Kind = kind, **_: Any) -> None:
            manifest: Manifest = event["object"]
            metadata = manifest["metadata"]
            feed.take(event["type"], manifest)
            state.saw_object(kind, metadata.get("namespace", ""), metadata["uid"])

        group, _, version = kind.api_version.rpartition("/")
        kopf.on.event(group=group, version=version, plural=kind.plural, id=kind.plural, registry=registry)(on_event)
    return registry


def build_kopf_settings(kinds: Collection[Kind]) -> kopf.OperatorSettings:
    """Return kopf's settings: nothing of its own written anywhere, filtered and bounded watches."""
    settings = kopf.OperatorSettings()
    settings.persistence.finalizer = f"{names.API_GROUP}/never"
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.persistence.progress_storage = _NoProgress()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.queueing.worker_limit = _WORKER_LIMIT
    settings.queueing.idle_timeout = 0.1
    settings.queueing.exit_timeout = 0.1
    settings.watching.server_timeout = _SERVER_TIMEOUT_S
    settings.watching.inactivity_timeout = _INACTIVITY_TIMEOUT_S
    settings.watching.connect_timeout = 10.0
    settings.watching.chunk_size = _PAGE_SIZE
    settings.networking.request_timeout = 60.0
    settings.networking.connect_timeout = 10.0
    settings.networking.error_backoffs = _RETRIES_S
    settings.process.ultimate_exiting_timeout = None
    for kind in set(kinds) - _UNFILTERED_KINDS:
        settings.watching.label_selectors[kind.group, kind.plural] = _OURS
    return settings


class _NoDiffBase(kopf.DiffBaseStorage):
    """Remembers no last state; spares a deep copy of each object at each event, too."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        pass


class _NoProgress(kopf.ProgressStorage):
    """Remembers no handlers' progress: an event handler has none."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass

    def clear(self, *, essence: Any) -> Any:
        return essence
