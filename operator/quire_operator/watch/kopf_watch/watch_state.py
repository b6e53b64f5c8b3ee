"""How far the watches are: what was listed, what of that has arrived, and when each stream last showed life.

Knows no kopf and no HTTP, only their traces: `handlers.py` reports responses and events. A *stream* is one kind in one
namespace (or in all). Invariant: a stream is synced once its first listing is complete and each listed object has been
handed over, so that whoever decides after `wait_synced` has seen everything that there was.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from quire_kube.objects import Kind


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Stream:
    """One watch."""

    kind: Kind
    namespace: str = ""
    """Empty: all namespaces."""

    @property
    def path(self) -> str:
        """Where the API server lists and watches it."""
        return self.kind.path(self.namespace)


class ListMetadata(msgspec.Struct, rename={"resume": "continue", "version": "resourceVersion"}):
    """Of a listing: what its next page is asked for by, and how new it is."""

    resume: str | None = None
    version: str | None = None


class ItemMetadata(msgspec.Struct):
    uid: str


class Item(msgspec.Struct):
    metadata: ItemMetadata


class Page(msgspec.Struct):
    """What counts of a page of a listing; all else is not even decoded."""

    metadata: ListMetadata
    items: list[Item] | None = None


@dataclass(slots=True)
class _Progress:
    alive_at: float
    num_bytes: Callable[[], int] | None = None
    """How much of the watch under way has arrived; each bookmark adds to it."""
    num_bytes_seen: int = 0
    listing: set[str] = field(default_factory=set)
    """Uids on the pages of the listing under way."""
    arrived: set[str] = field(default_factory=set)
    """Uids handed over while the first listing goes on: its early pages are, before its last is there."""
    pending: set[str] | None = None
    """Uids of the first complete listing that have not been handed over yet; None before it is complete."""


class WatchState:
    """The state of all streams of one run of the watches.

    Args:
        streams: all that are to be watched.
        on_listed: told, with the uids and the listing's resource version, whenever a stream has been listed completely:
            what is older and not among them is gone, and no event will ever say so.
    """

    def __init__(
        self, streams: Iterable[Stream], on_listed: Callable[[Stream, frozenset[str], int], None], now: float
    ) -> None:
        self._progress = {stream: _Progress(alive_at=now) for stream in streams}
        self._streams_by_path = {stream.path: stream for stream in self._progress}
        self._on_listed = on_listed
        self._synced = asyncio.Event()
        self._check_synced()

    def stream_at(self, path: str) -> Stream | None:
        """Return the stream that a URL's path belongs to."""
        return self._streams_by_path.get(path)

    def saw_life(self, stream: Stream, now: float, num_bytes: Callable[[], int] | None = None) -> None:
        """Take note that the API server has answered; where it goes on to, `num_bytes` tells how much has come."""
        progress = self._progress[stream]
        progress.alive_at, progress.num_bytes, progress.num_bytes_seen = now, num_bytes, 0

    def saw_page(self, stream: Stream, page: Page, is_first: bool) -> None:
        """Take note of one page of a listing."""
        progress = self._progress[stream]
        if is_first:
            progress.listing.clear()
        progress.listing.update(item.metadata.uid for item in page.items or ())
        if page.metadata.resume:
            return
        uids, progress.listing = frozenset(progress.listing), set()
        if progress.pending is None:
            progress.pending, progress.arrived = set(uids) - progress.arrived, set()
            self._check_synced()
        version = page.metadata.version or ""
        self._on_listed(stream, uids, int(version) if version.isdigit() else -1)

    def saw_object(self, kind: Kind, namespace: str, uid: str) -> None:
        """Take note that an object has been handed over."""
        if self._synced.is_set():
            return
        for stream in (Stream(kind=kind, namespace=namespace), Stream(kind=kind)):
            progress = self._progress.get(stream)
            if progress is not None and progress.pending is not None:
                progress.pending.discard(uid)
            elif progress is not None:
                progress.arrived.add(uid)
        self._check_synced()

    async def wait_synced(self) -> None:
        """Wait until every stream is synced."""
        await self._synced.wait()

    @property
    def is_synced(self) -> bool:
        return self._synced.is_set()

    def unsynced(self) -> tuple[Stream, ...]:
        """Return the streams that are waited for."""
        return tuple(stream for stream, progress in self._progress.items() if progress.pending != set())

    def ages_s(self, now: float) -> Iterator[tuple[Stream, float]]:
        """Yield for how long each stream has shown no life; what has come since the last look is a sign of now."""
        for stream, progress in self._progress.items():
            num_bytes = progress.num_bytes() if progress.num_bytes is not None else 0
            if num_bytes > progress.num_bytes_seen:
                progress.alive_at, progress.num_bytes_seen = now, num_bytes
            yield stream, now - progress.alive_at

    def _check_synced(self) -> None:
        if all(progress.pending is not None and not progress.pending for progress in self._progress.values()):
            self._synced.set()
