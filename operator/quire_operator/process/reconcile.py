"""One LLMDeployment from what is observed to what is wanted: observe → plan → apply → status → events.

Holds no state of its own: run at any time, any number of times, for any key, it ends in the same place, and where there
is nothing to change it writes nothing. Knows none of the rules by which is decided.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from quire_contract import names
from quire_contract.model_facts import DownloadProgress
from quire_contract.phases import Readiness
from quire_kube.api import AlreadyExistsError, Kube, KubeError, NamespaceTerminatingError, NotFoundError
from quire_kube.objects import Key, Manifest
from quire_operator.apply.apply import Applied, apply_actions, with_refusals
from quire_operator.plan.actions import Action, Plan
from quire_operator.plan.cache.orphans import plan_orphans
from quire_operator.plan.plan import plan as make_plan
from quire_operator.plan.rollout import earliest
from quire_operator.spec.kinds import LLM_DEPLOYMENT, OPTIONAL_KINDS, WORKLOAD_KINDS
from quire_operator.spec.settings import Settings
from quire_operator.status.status import derive_status
from quire_operator.status.transitions import build_events
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observe import (
    PodAnswers,
    observe,
    pod_to_ask_progress,
    pods_to_ask_loads,
    pods_to_ask_readiness,
)
from quire_operator.watch.observed import Observed
from quire_operator.watch.store import Store
from quire_operator.watch.warning_events import fetch_warnings

logger = logging.getLogger(__name__)

MAX_ROUNDS: Final = 4
"""How often a plan is made anew because the last one changed something, before the status is written all the same."""
AFTER_MAX_ROUNDS_S: Final = 1.0


class PodProber(Protocol):
    """Asks pods directly. Pods that do not answer are left out; no method raises for their sake."""

    async def fetch_readiness(self, pods: Sequence[Manifest]) -> Mapping[str, Readiness]:
        """Ask serving pods how far they are; by pod name."""
        ...

    async def fetch_loads(self, pods: Sequence[Manifest]) -> Mapping[str, int]:
        """Ask serving pods for their requests, running and waiting; by pod name."""
        ...

    async def fetch_progress(self, pod: Manifest) -> DownloadProgress | None:
        """Ask a download how far it is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciler:
    """Everything that a reconcile needs; `reconcile` is the queue's work."""

    kube: Kube
    store: Store
    cluster: Callable[[], ClusterFacts]
    settings: Callable[[], Settings]
    prober: PodProber
    clock: Callable[[], float]
    """Unix time."""

    async def reconcile(self, key: Key) -> float | None:
        """Bring one LLMDeployment to where it should be; return after how many seconds to look again.

        Raises:
            KubeError: something failed that trying again may cure. What could be done has been done.
        """
        now = self.clock()
        orphans = await self._clear_orphans(key.namespace, now)
        result = await self._converge(key, now)
        if result is None:  # gone, or going
            _raise_unless_done(orphans)
            return None
        if result.applied.is_namespace_ending:
            return None
        try:
            await self._report(result, now)
        except (NotFoundError, NamespaceTerminatingError):
            return None
        _raise_unless_done(result.applied)
        return earliest(result.plan.requeue_after_s, result.look_again_s)

    async def _converge(self, key: Key, now: float) -> "_Result | None":
        """Plan and apply until a plan has nothing left to do."""
        seen = observe(self.store, key, at=now)
        if seen is None or "deletionTimestamp" in seen.manifest["metadata"]:
            return None
        answers = await self._ask(seen)
        warnings, look_again_s = await fetch_warnings(self.kube, seen, now)
        done: list[Action] = []
        for _ in range(MAX_ROUNDS):
            seen = observe(self.store, key, probes=answers, warnings=warnings, at=now)
            if seen is None:
                return None
            observed = seen
            plan = self._plan(observed, now)
            if plan.needs_loads:
                loads = await self.prober.fetch_loads(pods_to_ask_loads(observed))
                observed = dataclasses.replace(observed, loads=loads)
                plan = self._plan(observed, now)
            applied = await apply_actions(self.kube, self.store, plan.actions, now=now)
            done += applied.done
            if not applied.has_learned or not applied.is_complete:
                break
        else:
            look_again_s = AFTER_MAX_ROUNDS_S
        applied = dataclasses.replace(applied, done=tuple(done))
        return _Result(observed=observed, plan=plan, applied=applied, look_again_s=look_again_s)

    async def _ask(self, observed: Observed) -> PodAnswers:
        pods, downloader = pods_to_ask_readiness(observed), pod_to_ask_progress(observed)
        readiness = await self.prober.fetch_readiness(pods) if pods else {}
        progress = await self.prober.fetch_progress(downloader) if downloader else None
        return PodAnswers(readiness=readiness, progress=progress)

    def _plan(self, observed: Observed, now: float) -> Plan:
        return make_plan(observed, self.cluster(), self.settings(), now)

    async def _report(self, result: "_Result", now: float) -> None:
        """Write the status if it says something new, and the Events that go with it."""
        observed, applied = result.observed, result.applied
        manifest, old = observed.manifest, observed.manifest.get("status") or {}
        plan = with_refusals(result.plan, applied)
        new = derive_status(observed, plan, self.cluster(), self.settings(), now)
        if without_nulls(new) != without_nulls(old):
            metadata = {key: manifest["metadata"][key] for key in ("name", "namespace", "uid")}
            head = {"apiVersion": names.GROUP_VERSION, "kind": names.KIND, "metadata": metadata}
            self.store.put(await self.kube.apply_status({**head, "status": without_nulls(new)}))
        done_without = [refusal.as_verdict() for refusal in applied.refusals if refusal.is_minor]
        for event in build_events(manifest, old, new, applied.done, done_without, now):
            try:
                await self.kube.create(event)
            except AlreadyExistsError:
                continue
            except KubeError as error:  # an Event is a courtesy
                logger.warning("Event not written: %s", error)

    async def _clear_orphans(self, namespace: str, now: float) -> Applied:
        """Clear away what no LLMDeployment of the namespace uses any more."""
        claims, jobs = self.store.claims_without_users(namespace), self.store.jobs_without_users(namespace)
        if not plan_orphans(claims, jobs, now):
            return Applied()
        # The watch may not have told of every user yet, and what a volume holds is slow to get again: ask.
        fresh = Store()
        try:
            users = await self._list_users(namespace)
        except KubeError as error:
            return Applied(failure=error)
        for manifest in (*users, *claims, *jobs):
            fresh.put(manifest)
        unused = fresh.claims_without_users(namespace), fresh.jobs_without_users(namespace)
        return await apply_actions(self.kube, self.store, plan_orphans(*unused, now), now=now)

    async def _list_users(self, namespace: str) -> Sequence[Manifest]:
        """Return all that may hold a volume: LLMDeployments, and the workloads that mount what these used before."""
        users = list(await self.kube.list(LLM_DEPLOYMENT, namespace))
        for kind in WORKLOAD_KINDS:
            if kind not in OPTIONAL_KINDS or self.cluster().has(kind):
                users += await self.kube.list(kind, namespace, f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}")
        return users


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """Where the rounds ended."""

    observed: Observed
    plan: Plan
    applied: Applied
    """Of the last round, but for `done`, which is of all."""
    look_again_s: float | None


def without_nulls(value: Any) -> Any:
    """Return JSON without null fields, which the API server does not keep either."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _raise_unless_done(applied: Applied) -> None:
    if applied.failure is not None:
        raise applied.failure
    if applied.refusals:  # the one that is to be looked at again first
        raise min((refusal.error for refusal in applied.refusals), key=_longest_wait_s)


def _longest_wait_s(error: KubeError) -> float:
    return float(getattr(error, "retry_within_s", math.inf))
