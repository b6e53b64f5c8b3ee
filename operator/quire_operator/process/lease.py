"""Leadership: of several operators, only the holder of one `coordination.k8s.io` Lease works.

`observe`, `can_take` and `build_lease` decide, purely; `Leadership` calls the API server. Knows nothing of the work.

Invariants: no two processes' clocks are ever compared (a lease has expired when *this* process has seen it unchanged
for its whole duration, by a monotonic clock); the holder stops working before its own lease can expire for others,
counted from the *start* of its last successful renewal; a lease is given back by nobody whose work may still run.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from quire_kube.api import ConflictError, Kube, KubeError, NotFoundError
from quire_kube.objects import Manifest, Ref
from quire_operator.spec.kinds import LEASE

logger = logging.getLogger(__name__)

RENEWALS_PER_DURATION: Final = 3
LOOKS_PER_DURATION: Final = 10
"""By those who wait. What a look is late after a renewal is added to the time until they take a dead holder's lease."""
STOP_SHARE: Final = 1 / 3
"""Of the duration: kept for the work to stop in."""
MIN_STOP_S: Final = 0.5
"""For the work to stop in where the lease has expired already, because this process had no time for so long."""


class WorkDidNotStopError(Exception):
    """The lease is lost and the work goes on all the same: the process must end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseConfig:
    """Which lease, and on whose behalf."""

    namespace: str
    name: str
    identity: str
    duration_s: float = 15.0

    def __post_init__(self) -> None:
        if self.duration_s < 1:
            raise ValueError(f"A lease must last a second or more, not {self.duration_s:g} s.")

    @property
    def ref(self) -> Ref:
        return Ref(kind=LEASE, namespace=self.namespace, name=self.name)

    @property
    def renew_s(self) -> float:
        return self.duration_s / RENEWALS_PER_DURATION

    @property
    def look_s(self) -> float:
        return self.duration_s / LOOKS_PER_DURATION

    @property
    def renew_deadline_s(self) -> float:
        """How long after the start of the last renewal the work is told to stop."""
        return self.duration_s * (1 - STOP_SHARE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A lease as it was found, and since when it has been just so."""

    holder: str
    duration_s: float
    record: tuple[Any, ...]
    """What changes whenever the holder renews."""
    seen_at: float
    """On this process's monotonic clock."""

    @property
    def expires_at(self) -> float:
        return self.seen_at + self.duration_s


def observe(previous: Sighting | None, lease: Manifest, now: float) -> Sighting:
    """Return what is known of the lease; its age counts from when it was first seen like this."""
    spec = lease.get("spec") or {}
    holder = spec.get("holderIdentity") or ""
    record = (holder, spec.get("renewTime"), spec.get("acquireTime"), spec.get("leaseTransitions"))
    is_unchanged = previous is not None and previous.record == record
    return Sighting(
        holder=holder,
        duration_s=float(spec.get("leaseDurationSeconds") or 0),
        record=record,
        seen_at=previous.seen_at if previous is not None and is_unchanged else now,
    )


def can_take(sighting: Sighting, identity: str, now: float) -> bool:
    """Whether the lease is free, or ours already, or its holder has not renewed it for its whole duration."""
    return sighting.holder in ("", identity) or now >= sighting.expires_at


def build_lease(config: LeaseConfig, current: Manifest | None, wall_time: float) -> Manifest:
    """Return the lease as held by us. `current` gives its resourceVersion, so that only one of two takers succeeds."""
    spec = dict((current or {}).get("spec") or {})
    now = _micro_time(wall_time)
    is_ours = spec.get("holderIdentity") == config.identity
    transitions = int(spec.get("leaseTransitions") or 0)
    spec |= {
        "holderIdentity": config.identity,
        "leaseDurationSeconds": max(1, round(config.duration_s)),
        "acquireTime": spec.get("acquireTime") or now if is_ours else now,
        "renewTime": now,
        "leaseTransitions": transitions if is_ours or current is None else transitions + 1,
    }
    return _with_spec(config, current, spec)


def build_released(config: LeaseConfig, current: Manifest, wall_time: float) -> Manifest:
    """Return the lease as held by nobody, so that another takes it at once."""
    spec = {**(current.get("spec") or {}), "holderIdentity": "", "leaseDurationSeconds": 1}
    return _with_spec(config, current, spec | {"renewTime": _micro_time(wall_time)})


def _with_spec(config: LeaseConfig, current: Manifest | None, spec: dict[str, Any]) -> Manifest:
    metadata = dict((current or {}).get("metadata") or {"name": config.name, "namespace": config.namespace})
    return {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": metadata, "spec": spec}


def _now() -> float:
    return asyncio.get_running_loop().time()


def _micro_time(wall_time: float) -> str:
    return datetime.fromtimestamp(wall_time, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Leadership:
    """Waits for the lease, works while it is held, and gives it back in the end.

    Args:
        kube: where the lease is.
        on_change: told whenever the lease is won (True) or lost (False).
    """

    def __init__(self, kube: Kube, config: LeaseConfig, on_change: Callable[[bool], None]) -> None:
        self._kube = kube
        self._config = config
        self._on_change = on_change
        self._working: asyncio.Future[None] | None = None
        self._held: Manifest | None = None
        self._renewed_at = 0.0

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Work whenever the lease is held, until the work ends by itself or this is cancelled.

        Raises:
            WorkDidNotStopError: the process must end now.
            Exception: whatever the work raises; the lease is given back, since the work has ended.
        """
        while True:
            await self._acquire()
            logger.info("Acquired lease lease=%s identity=%s", self._config.ref, self._config.identity)
            self._on_change(True)
            try:
                if await self._work_while_held(work):
                    return
            finally:
                self._on_change(False)
                if self._working is None or self._working.done():
                    await self._release()
            logger.warning("Lost lease lease=%s identity=%s", self._config.ref, self._config.identity)

    async def _acquire(self) -> None:
        sighting: Sighting | None = None
        while True:
            started_at = _now()
            try:
                async with asyncio.timeout(self._config.renew_deadline_s):
                    current = await self._kube.get(self._config.ref)
                    if current is not None:
                        previous, sighting = sighting, observe(sighting, current, _now())
                        if previous is None or previous.holder != sighting.holder:
                            logger.info("Found lease lease=%s holder=%s", self._config.ref, sighting.holder or "nobody")
                    if sighting is None or current is None or can_take(sighting, self._config.identity, started_at):
                        await self._write(current, started_at)
                        return
            except ConflictError:
                logger.debug("Somebody else took the lease lease=%s", self._config.ref)
            except (KubeError, TimeoutError) as error:
                logger.warning("Cannot get lease lease=%s err=%s", self._config.ref, str(error) or "timed out")
            pause_s = self._config.look_s * random.uniform(0.8, 1.2)
            if sighting is not None and sighting.expires_at > _now():
                pause_s = min(pause_s, sighting.expires_at - _now())
            await asyncio.sleep(pause_s)

    async def _write(self, current: Manifest | None, started_at: float) -> None:
        wanted = build_lease(self._config, current, time.time())
        self._held = await (self._kube.create(wanted) if current is None else self._kube.replace(wanted))
        self._renewed_at = started_at

    async def _work_while_held(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Return True when the work has ended by itself, False when the lease was lost and the work has stopped."""
        self._working = working = asyncio.ensure_future(work())
        renewing = asyncio.ensure_future(self._renew_until_lost())
        try:
            await asyncio.wait({working, renewing}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return True
            renewing.result()
            return False
        finally:
            renewing.cancel()
            await self._stop(working)

    async def _stop(self, working: asyncio.Future[None]) -> None:
        if working.done():
            return
        working.cancel()
        left_s = self._renewed_at + self._config.duration_s - _now()
        await asyncio.wait({working}, timeout=max(left_s, MIN_STOP_S))
        if not working.done():
            raise WorkDidNotStopError(f"the work still runs {self._config.duration_s:g} s after the last renewal")
        with contextlib.suppress(asyncio.CancelledError):
            if (error := working.exception()) is not None:
                logger.warning("Work failed while it stopped err=%r", error)

    async def _renew_until_lost(self) -> None:
        pause_s = self._config.renew_s
        while True:
            left_s = self._renewed_at + self._config.renew_deadline_s - _now()
            if left_s <= 0:
                return
            await asyncio.sleep(min(pause_s, left_s))
            started_at = _now()
            if not await self._renew(started_at):
                return
            is_renewed = self._renewed_at == started_at
            pause_s = self._config.renew_s if is_renewed else self._config.renew_s / 5

    async def _renew(self, started_at: float) -> bool:
        """Return False when somebody else holds the lease; a failure to ask is no loss yet."""
        left_s = self._renewed_at + self._config.renew_deadline_s - started_at
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                try:
                    await self._write(self._held, started_at)
                except ConflictError:  # Somebody touched it, or an earlier write arrived after all: look who holds it.
                    self._held = await self._kube.get(self._config.ref)
                    holder = ((self._held or {}).get("spec") or {}).get("holderIdentity")
                    if self._held is not None and holder != self._config.identity:
                        logger.warning("Lease taken lease=%s holder=%s", self._config.ref, holder or "nobody")
                        return False
                    await self._write(self._held, started_at)
        except NotFoundError:
            self._held = None  # Deleted by somebody: the next write creates it.
        except (KubeError, TimeoutError) as error:
            logger.warning("Cannot renew lease lease=%s err=%s", self._config.ref, str(error) or "timed out")
        return True

    async def _release(self) -> None:
        held, self._held = self._held, None
        if held is None or (held.get("spec") or {}).get("holderIdentity") != self._config.identity:
            return
        with contextlib.suppress(KubeError, TimeoutError):
            async with asyncio.timeout(2.0):
                await self._kube.replace(build_released(self._config, held, time.time()))
                logger.info("Released lease lease=%s", self._config.ref)
