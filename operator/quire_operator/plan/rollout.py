"""How a changed workload reaches its pods, and which pods go first when there are to be fewer.

Answers for `plan.py` and `status.py` from pods and the live workload. Knows no documents: whether a template differs is
told by its revision alone. A pod that is ending belongs neither to the old nor to the current pods.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from quire_contract.names import ANNOTATION_POD_DELETION_COST, LABEL_REVISION, workload_name
from quire_kube.objects import Kind, Manifest, Ref, annotation_of, label_of
from quire_kube.times import parse_time
from quire_operator.plan.actions import Annotate
from quire_operator.spec.kinds import DEPLOYMENT, POD, WORKLOAD_KINDS
from quire_operator.watch.observed import Observed
from quire_operator.watch.pods import is_ending, is_ready

IDLE_POLL_S: Final = 5.0
"""How often pods that a rollout waits for are asked whether they are idle."""
_NOT_READY_COST: Final = -1
_UNKNOWN_LOAD_COST: Final = 1
"""A ready pod that did not say its load may well be busy: it goes after the idle ones."""


def live_workload(observed: Observed) -> tuple[Ref, Manifest] | None:
    """Return the workload that there is, unless it is being deleted; the newer of two, which follows the other."""
    return next(iter(live_workloads(observed)), None)


def live_workloads(observed: Observed) -> tuple[tuple[Ref, Manifest], ...]:
    """Return the workloads that are not being deleted, the newest first; two only while the kind changes.

    A child of another name is a copy that somebody made, and makes none of the pods.
    """
    children = sorted(observed.children.items(), key=lambda item: item[0])
    name = workload_name(observed.manifest["metadata"]["name"])
    live = [
        (ref, child)
        for ref, child in children
        if ref.kind in WORKLOAD_KINDS and ref.name == name and not is_ending(child)
    ]
    return tuple(sorted(live, key=_created, reverse=True))


def predecessor_of(observed: Observed, kind: Kind) -> tuple[Ref, Manifest] | None:
    """Return the live workload of another kind than this one, unless one of this kind has a ready replica already."""
    live = live_workloads(observed)
    if any(ref.kind == kind and ready_replicas_of(workload) for ref, workload in live):
        return None
    return next(((ref, workload) for ref, workload in live if ref.kind != kind), None)


def replicas_of(workload: Manifest) -> int:
    """Return how many replicas a workload is told to have."""
    return int(workload["spec"].get("replicas", 1))


def ready_replicas_of(workload: Manifest) -> int:
    return int((workload.get("status") or {}).get("readyReplicas", 0))


def _created(item: tuple[Ref, Manifest]) -> str:
    return str(item[1]["metadata"].get("creationTimestamp", ""))


def old_pods(observed: Observed, revision: str | None) -> tuple[Manifest, ...]:
    """Return the pods made from any other template, less those that are ending."""
    return tuple(pod for pod in observed.pods if not is_ending(pod) and label_of(pod, LABEL_REVISION) != revision)


def is_rollout_complete(observed: Observed, revision: str | None, replicas: int) -> bool:
    """Tell whether all replicas are of this revision and ready, and no other pod is left."""
    live = live_workload(observed)
    if revision is None or live is None or label_of(live[1], LABEL_REVISION) != revision:
        return False
    workload = live[1]
    status = workload.get("status") or {}
    generation = workload["metadata"].get("generation", 0)
    return (
        status.get("observedGeneration", generation) >= generation
        and status.get("replicas", 0) == replicas
        and status.get("updatedReplicas", 0) == replicas
        and ready_replicas_of(workload) >= replicas
        and not old_pods(observed, revision)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Whether a changed template waits for its predecessor's pods to become idle."""

    is_held: bool = False
    needs_loads: bool = False
    requeue_after_s: float | None = None


def hold_for_idle(observed: Observed, *, wait_s: float, revision: str, now: float) -> Hold:
    """Decide whether a template that replaces serving pods is applied now.

    A pod that is not ready has no requests, so a broken revision never delays its own repair. A pod whose load is not
    known counts as busy. The wait begins when status first says so (`status.rolloutWaitingSince`).
    """
    serving = [pod for pod in old_pods(observed, revision) if is_ready(pod)]
    if wait_s <= 0 or not serving:
        return Hold()
    loads = [observed.loads.get(pod["metadata"]["name"]) for pod in serving]
    needs_loads = None in loads
    if not needs_loads and not any(loads):
        return Hold()
    since = parse_time((observed.manifest.get("status") or {}).get("rolloutWaitingSince"))
    left_s = wait_s if since is None else since + wait_s - now
    if left_s <= 0:
        return Hold()
    return Hold(is_held=True, needs_loads=needs_loads, requeue_after_s=min(left_s, IDLE_POLL_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDown:
    """What goes before fewer replicas: the pods' deletion costs."""

    costs: tuple[Annotate, ...] = ()
    needs_loads: bool = False


def prepare_scale_down(observed: Observed, replicas: int) -> ScaleDown:
    """Write each pod's load as its deletion cost, so that the idlest goes; not needed where all go or none."""
    live = live_workload(observed)
    if live is None or live[0].kind != DEPLOYMENT or not 0 < replicas < replicas_of(live[1]):
        return ScaleDown()
    pods = [pod for pod in observed.pods if not is_ending(pod)]
    loads = observed.loads
    needs_loads = any(is_ready(pod) and pod["metadata"]["name"] not in loads for pod in pods)
    return ScaleDown(costs=tuple(_costs(pods, observed)), needs_loads=needs_loads)


def _costs(pods: Iterable[Manifest], observed: Observed) -> Iterable[Annotate]:
    for pod in pods:
        cost = _NOT_READY_COST
        if is_ready(pod):
            cost = observed.loads.get(pod["metadata"]["name"], _UNKNOWN_LOAD_COST)
        if annotation_of(pod, ANNOTATION_POD_DELETION_COST) != str(cost):
            yield Annotate(
                ref=Ref(kind=POD, namespace=pod["metadata"]["namespace"], name=pod["metadata"]["name"]),
                annotations={ANNOTATION_POD_DELETION_COST: str(cost)},
                reason="ScaleDown: the pod with the fewest requests goes first",
            )


def earliest(*seconds: float | None) -> float | None:
    """Return the least of several waits; None: none of them."""
    return min((each for each in seconds if each is not None), default=None)
