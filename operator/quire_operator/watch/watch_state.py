"""How far the watches are: what was listed, what of that has arrived, and when each stream last showed life.

Knows no kopf and no HTTP, only their traces: `handlers.py` reports responses and events. A *stream* is one kind in one
namespace (or in all). Invariant: a stream is synced once its first listing is complete and each listed object has been
handed over, so that whoever decides after `wait_synced` has seen everything that there was.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(slots=True)
class _Progress:
    alive_at: float
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

    def saw_life(self, stream: Stream, now: float) -> None:
        """Take note that the API server has answered, or sent an event or a bookmark."""
        self._progress[stream].alive_at = now

    def saw_page(self, stream: Stream, page: Mapping[str, Any], is_first: bool) -> None:
        """Take note of one page of a listing."""
        progress = self._progress[stream]
        if is_first:
            progress.listing.clear()
        progress.listing.update(item["metadata"]["uid"] for item in page.get("items") or ())
        metadata = page.get("metadata") or {}
        if metadata.get("continue"):
            return
        uids, progress.listing = frozenset(progress.listing), set()
        if progress.pending is None:
            progress.pending, progress.arrived = set(uids) - progress.arrived, set()
            self._check_synced()
        version = str(metadata.get("resourceVersion") or "")
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
        """Yield for how long each stream has shown no life."""
        return ((stream, now - progress.alive_at) for stream, progress in self._progress.items())

    def _check_synced(self) -> None:
        if all(progress.pending is not None and not progress.pending for progress in self._progress.values()):
            self._synced.set()
