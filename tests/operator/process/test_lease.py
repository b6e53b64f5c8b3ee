"""Leadership: pure decisions, and the loop against one lease in memory."""

import asyncio
import copy
from typing import Any

import pytest
from virtual_time import now, run

from quire_kube.api import AlreadyExistsError, ConflictError, NotFoundError, UnavailableError
from quire_operator.process.lease import (
    LOOKS_PER_DURATION,
    RENEWALS_PER_DURATION,
    Leadership,
    LeaseConfig,
    WorkDidNotStopError,
    build_lease,
    build_released,
    can_take,
    observe,
)


def config(identity: str, duration_s: float = 15.0) -> LeaseConfig:
    return LeaseConfig(namespace="quire-system", name="quire-operator", identity=identity, duration_s=duration_s)


def held_by(holder: str, renew_time: str = "2026-01-01T00:00:00.000000Z", duration_s: int = 15) -> dict[str, Any]:
    spec = {"holderIdentity": holder, "renewTime": renew_time, "leaseDurationSeconds": duration_s}
    return {"metadata": {"name": "quire-operator", "namespace": "quire-system", "resourceVersion": "1"}, "spec": spec}


class OneLease:
    """A server that knows one lease. `is_down` lets every request fail."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.is_down = False
        self.num_writes = 0
        self._version = 0

    async def get(self, ref: object) -> dict[str, Any] | None:
        await self._answer()
        return copy.deepcopy(self.lease)

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        await self._answer()
        if self.lease is not None:
            raise AlreadyExistsError("there already")
        return self._keep(manifest)

    async def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
        await self._answer()
        if self.lease is None:
            raise NotFoundError("gone")
        if manifest["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ConflictError("changed")
        return self._keep(manifest)

    @property
    def holder(self) -> str | None:
        return None if self.lease is None else self.lease["spec"]["holderIdentity"]

    def _keep(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        self.num_writes += 1
        self.lease = copy.deepcopy(manifest)
        self.lease["metadata"]["resourceVersion"] = str(self._version)
        return copy.deepcopy(self.lease)

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        if self.is_down:
            raise UnavailableError("down")


class Worker:
    """Work that goes on until cancelled; says whether it runs."""

    def __init__(self, is_stubborn: bool = False) -> None:
        self.is_running = False
        self.release = asyncio.Event()
        self._is_stubborn = is_stubborn

    async def __call__(self) -> None:
        self.is_running = True
        try:
            while True:
                try:
                    await self.release.wait()
                    return
                except asyncio.CancelledError:
                    if not self._is_stubborn:
                        raise
        finally:
            self.is_running = False


async def until(condition: Any, timeout_s: float = 100.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def leader(kube: OneLease, identity: str, worker: Worker, duration_s: float = 15.0) -> "asyncio.Task[None]":
    leadership = Leadership(kube, config(identity, duration_s), lambda is_leader: None)  # type: ignore[arg-type]
    return asyncio.ensure_future(leadership.run(worker))


async def stop(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_free_lease_and_own_lease_can_be_taken() -> None:
    assert can_take(observe(None, held_by(""), now=0.0), "me", now=0.0)
    assert can_take(observe(None, held_by("me"), now=0.0), "me", now=0.0)


def test_foreign_lease_expires_by_our_own_clock() -> None:
    """The holder's clock may be hours off: what counts is how long we have seen no change."""
    seen = observe(None, held_by("other", renew_time="1999-01-01T00:00:00.000000Z"), now=100.0)
    assert not can_take(seen, "me", now=100.0)
    again = observe(seen, held_by("other", renew_time="1999-01-01T00:00:00.000000Z"), now=110.0)
    assert not can_take(again, "me", now=114.9)
    assert can_take(again, "me", now=115.0)


def test_each_renewal_starts_the_wait_anew() -> None:
    seen = observe(None, held_by("other", renew_time="a"), now=100.0)
    renewed = observe(seen, held_by("other", renew_time="b"), now=114.0)
    assert not can_take(renewed, "me", now=128.9)
    assert can_take(renewed, "me", now=129.0)


def test_taking_over_counts_a_transition_and_keeps_the_version() -> None:
    lease = build_lease(config("me"), held_by("other"), wall_time=0.0)
    assert lease["spec"]["leaseTransitions"] == 1
    assert lease["spec"]["holderIdentity"] == "me"
    assert lease["spec"]["acquireTime"] == lease["spec"]["renewTime"] == "1970-01-01T00:00:00.000000Z"
    assert lease["metadata"]["resourceVersion"] == "1"


def test_renewing_changes_only_the_time() -> None:
    first = build_lease(config("me"), None, wall_time=0.0)
    second = build_lease(config("me"), first, wall_time=5.0)
    assert second["spec"] == first["spec"] | {"renewTime": "1970-01-01T00:00:05.000000Z"}


def test_released_lease_is_free_at_once() -> None:
    released = build_released(config("me"), held_by("me"), wall_time=0.0)
    assert can_take(observe(None, released, now=0.0), "other", now=0.0)


def test_too_short_a_duration_is_refused() -> None:
    with pytest.raises(ValueError, match="a second or more"):
        config("me", duration_s=0.5)


def test_only_one_works_and_the_other_takes_over_when_it_stops() -> None:
    async def scenario() -> None:
        kube = OneLease()
        first, second = Worker(), Worker()
        one = leader(kube, "one", first)
        await until(lambda: first.is_running)
        two = leader(kube, "two", second)
        writes = kube.num_writes
        await until(lambda: kube.num_writes > writes + 3)
        assert first.is_running
        assert not second.is_running
        await stop(one)
        assert kube.holder == ""
        await until(lambda: second.is_running)
        assert kube.holder == "two"
        await stop(two)

    run(scenario())


@pytest.mark.parametrize("lives_s", [0.0, 2.5, 4.9, 5.1, 12.0])
def test_one_that_dies_is_succeeded_when_its_lease_has_expired(lives_s: float) -> None:
    async def scenario() -> None:
        kube = OneLease()
        renewals: list[float] = []

        async def renew() -> None:
            while True:
                renewals.append(now())
                kube._keep(held_by("one", renew_time=str(now())))
                await asyncio.sleep(15 / RENEWALS_PER_DURATION)

        one, second = asyncio.ensure_future(renew()), Worker()
        two = leader(kube, "two", second)
        await asyncio.sleep(lives_s)
        await stop(one)
        await until(lambda: second.is_running)
        assert 15 <= now() - renewals[-1] <= 15 + 15 * 1.2 / LOOKS_PER_DURATION + 0.1
        await stop(two)

    run(scenario())


def test_holder_that_cannot_renew_stops_before_anyone_can_take_the_lease() -> None:
    async def scenario() -> None:
        kube = OneLease()
        worker = Worker()
        one = leader(kube, "one", worker)
        await until(lambda: worker.is_running)
        kube.is_down = True
        await until(lambda: not worker.is_running)
        kube.is_down = False
        assert kube.holder == "one"
        await until(lambda: worker.is_running)
        await stop(one)

    run(scenario())


def test_lease_taken_by_force_stops_the_work_and_is_left_alone() -> None:
    async def scenario() -> None:
        kube = OneLease()
        worker = Worker()
        one = leader(kube, "one", worker)
        await until(lambda: worker.is_running)
        kube._keep({**held_by("thief", duration_s=600)})
        await until(lambda: not worker.is_running)
        assert kube.holder == "thief"
        await stop(one)
        assert kube.holder == "thief"

    run(scenario())


def test_touched_or_deleted_lease_is_no_loss() -> None:
    async def scenario() -> None:
        kube = OneLease()
        worker = Worker()
        one = leader(kube, "one", worker)
        await until(lambda: worker.is_running)
        assert kube.lease is not None
        kube._keep(kube.lease)  # somebody labels it
        writes = kube.num_writes
        await until(lambda: kube.num_writes > writes + 2)
        kube.lease = None
        await until(lambda: kube.holder == "one")
        assert worker.is_running
        await stop(one)

    run(scenario())


def test_work_that_does_not_stop_ends_the_process() -> None:
    async def scenario() -> None:
        kube = OneLease()
        worker = Worker(is_stubborn=True)
        one = leader(kube, "one", worker)
        await until(lambda: worker.is_running)
        kube.is_down = True
        with pytest.raises(WorkDidNotStopError):
            await one
        worker.release.set()
        await until(lambda: not worker.is_running)

    run(scenario())


@pytest.mark.parametrize("num_cancels", [1, 2], ids=["too late", "in the middle of stopping"])
def test_a_lease_is_not_given_back_while_the_work_still_runs(num_cancels: int) -> None:
    """Whoever took it would work at the same time: others wait until it has expired, as client-go's do."""

    async def scenario() -> None:
        kube = OneLease()
        worker = Worker(is_stubborn=True)
        one = leader(kube, "one", worker)
        await until(lambda: worker.is_running)
        for _ in range(num_cancels):
            one.cancel()
            await asyncio.sleep(0.1)
        with pytest.raises((WorkDidNotStopError, asyncio.CancelledError)):
            await one
        assert worker.is_running
        assert kube.holder == "one"
        worker.release.set()
        await until(lambda: not worker.is_running)

    run(scenario())


def test_failed_work_gives_the_lease_back() -> None:
    async def scenario() -> None:
        kube = OneLease()

        async def fail() -> None:
            raise RuntimeError("broken")

        leadership = Leadership(kube, config("one"), lambda is_leader: None)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="broken"):
            await leadership.run(fail)
        assert kube.holder == ""

    run(scenario())
