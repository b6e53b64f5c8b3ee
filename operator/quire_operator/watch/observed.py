"""All that is known about one LLMDeployment at one moment: what `plan` and `status` decide from.

Everything comes from the watch caches, but for what pods are asked directly (progress, phase, load) and Warning events,
which are fetched only while something is not ready. Manifests are as the API server sent them, less managedFields.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from quire_contract.model_facts import DownloadProgress
from quire_contract.phases import Readiness
from quire_kube.objects import Manifest, Ref


@dataclass(frozen=True, slots=True, kw_only=True)
class WarningEvent:
    """A Kubernetes Event that tells of trouble with one of our objects; the newest of its kind."""

    kind: str
    """Kind of the object that it is about, such as Pod."""
    name: str
    reason: str
    message: str
    time: float
    """Unix time."""
    container: str = ""
    """Which of a pod's containers it is about; empty where it is about the pod."""


def find_warning(
    warnings: Iterable[WarningEvent], kind: str, name: str, reasons: Collection[str] | None = None
) -> WarningEvent | None:
    """Return the newest warning about one object, of any reason or of those given."""
    found = [
        warning
        for warning in warnings
        if (warning.kind, warning.name) == (kind, name) and (reasons is None or warning.reason in reasons)
    ]
    return max(found, key=lambda warning: (warning.time, warning.message), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One LLMDeployment and everything that belongs to it."""

    manifest: Manifest
    """The LLMDeployment itself, with its status as last written."""
    children: Mapping[Ref, Manifest] = field(default_factory=dict)
    """Objects of `OWNED_KINDS` that this LLMDeployment owns (by label and by the owner reference's uid)."""
    volume: Manifest | None = None
    """The claim that holds the model: the cache volume, `existingClaim`, or that of a pvc:// URI."""
    left_volume: Manifest | None = None
    """The claim that the status names still, though the model is another by now, if nobody else uses it."""
    job: Manifest | None = None
    """The download Job."""
    job_pods: tuple[Manifest, ...] = ()
    pods: tuple[Manifest, ...] = ()
    """Serving pods, those that are ending too."""
    other_cache_users: frozenset[str] = frozenset()
    """Names of other LLMDeployments in the namespace whose model is in the same volume."""
    progress: DownloadProgress | None = None
    """What the running download says."""
    readiness: Mapping[str, Readiness] = field(default_factory=dict)
    """What serving pods that are not ready say, by pod name; those that did not answer are absent."""
    loads: Mapping[str, int] = field(default_factory=dict)
    """Requests running and waiting, by pod name, as asked for a scale-down or a rollout; absent: not known."""
    warnings: tuple[WarningEvent, ...] = ()
    at: float = math.inf
    """When this was looked at, as Unix time: what has gone on for a moment only is no trouble yet."""
