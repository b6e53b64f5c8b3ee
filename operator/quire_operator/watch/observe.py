"""Gathers what is known of one LLMDeployment from the store, and says what remains to be asked and of whom.

Pure, but for reading the store. Decides nothing about the cluster.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from quire_contract.model_facts import DownloadProgress
from quire_contract.phases import Readiness
from quire_kube.objects import Key, Manifest
from quire_operator.watch.observed import Observed, WarningEvent
from quire_operator.watch.pods import can_answer, is_ready
from quire_operator.watch.store import Store, model_place


@dataclass(frozen=True, slots=True, kw_only=True)
class PodAnswers:
    """What pods said when asked; those that did not answer are absent."""

    readiness: Mapping[str, Readiness] = field(default_factory=dict)
    """Of serving pods, by name."""
    progress: DownloadProgress | None = None
    """Of the download."""


NO_ANSWERS = PodAnswers()


def observe(
    store: Store,
    key: Key,
    *,
    probes: PodAnswers = NO_ANSWERS,
    loads: Mapping[str, int] | None = None,
    warnings: tuple[WarningEvent, ...] = (),
    at: float = math.inf,
) -> Observed | None:
    """Return everything known about one LLMDeployment; None where there is none of this name."""
    manifest = store.llm(key)
    if manifest is None:
        return None
    namespace = key.namespace
    place = model_place(manifest)
    users = store.keys_using_claim(namespace, place.claim) if place else frozenset()
    return Observed(
        manifest=manifest,
        children=store.children_of(key, manifest["metadata"]["uid"]),
        volume=store.volume(namespace, place.claim) if place else None,
        left_volume=_left_volume(store, key, manifest),
        job=store.job(namespace, place.job) if place else None,
        job_pods=store.job_pods(namespace, place.job) if place else (),
        pods=store.pods_of(key),
        other_cache_users=frozenset(user.name for user in users if user != key),
        progress=probes.progress,
        readiness=probes.readiness,
        loads=loads or {},
        warnings=warnings,
        at=at,
    )


def pods_to_ask_readiness(observed: Observed) -> tuple[Manifest, ...]:
    """Return the serving pods that run and are not ready."""
    return tuple(pod for pod in observed.pods if can_answer(pod) and not is_ready(pod))


def pod_to_ask_progress(observed: Observed) -> Manifest | None:
    """Return the running pod of the download, the newest if there are several."""
    running = [pod for pod in observed.job_pods if can_answer(pod)]
    return max(running, key=lambda pod: pod["metadata"].get("creationTimestamp", ""), default=None)


def pods_to_ask_loads(observed: Observed) -> tuple[Manifest, ...]:
    """Return the serving pods that may hold requests, those that are ending too."""
    return tuple(pod for pod in observed.pods if _status(pod).get("phase") == "Running" and _status(pod).get("podIP"))


def _left_volume(store: Store, key: Key, manifest: Manifest) -> Manifest | None:
    """Return the claim of the model that the LLMDeployment had before its last change."""
    claim = ((manifest.get("status") or {}).get("cache") or {}).get("claimName")
    if claim is None or store.keys_using_claim(key.namespace, claim):
        return None
    return store.volume(key.namespace, claim)


def _status(pod: Manifest) -> Manifest:
    status: Manifest = pod.get("status") or {}
    return status
