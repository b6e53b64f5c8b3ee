"""Why a model is not served: one finding for each thing that is wrong with its volume, its Job and its workload.

Reads fragments of objects as an API server, a kubelet and a scheduler write them; pods are read by `pod_reasons`. A
`Finding` is made of a word that is fit for a condition's reason and a line that says what to do. Knows no conditions
and no plan. Invariant: what names a single try (a pod's random name, a back-off time) is left out, because a finding
that changes with every try would be written with every try.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from quire_kube.objects import Manifest
from quire_operator.plan.admission import Subject, read_refusal, strip_object
from quire_operator.plan.cache.volumes import NO_DEFAULT_STORAGE_CLASS, VOLUME_LOST
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import WarningEvent, find_warning
from quire_operator.watch.pods import condition_of, has_condition

MAX_REASON_LENGTH: Final = 128
MAX_LINE_LENGTH: Final = 1024
"""The CRD's limit on `status.reason`."""

STORAGE_CLASS_CURE: Final = "set spec.cache.storageClassName"
DEPLOYMENT_PAUSED: Final = "DeploymentPaused"
ROLLOUT_DEADLINE_EXCEEDED: Final = "ProgressDeadlineExceeded"

_OF_ONE_TRY: Final = (
    (re.compile(r'\b(?P<noun>pod)s? "[^"]*"'), r"the \g<noun>"),
    (re.compile(r"\bpod=\S+\([0-9a-f-]{36}\)"), "the pod"),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "…"),
    (re.compile(r'\b(?P<noun>sandbox|container) "?[0-9a-f]{64}"?'), r"the \g<noun>"),
    (re.compile(r"\bback-off (\d+(\.\d+)?(ms|h|m|s))+ "), "back-off "),
    (re.compile(r"\[?\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d([.,]\d+)?(Z|[+-]\d\d:?\d\d)?\]?:? ?"), ""),
)
"""What names or dates a single try, and what stands for it."""
_NOT_IN_REASON: Final = re.compile(r"[^A-Za-z0-9_]+")


class Stage(IntEnum):
    """What is wrong, the root of most troubles first: where several things are, the least one is named."""

    MODEL = 0
    """The volume or the download."""
    WORKLOAD = 1
    """Pods cannot be made."""
    PROCESS = 2
    """A container ended."""
    CONTAINER = 3
    """A container cannot be made: image, configuration, mounts."""
    SCHEDULING = 4
    """A pod has no node."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Finding:
    """One thing that is wrong. Ordered: the worst first, then by text, so that the same troubles give one answer."""

    stage: Stage
    reason: str
    detail: str
    is_final: bool = False
    """Waiting does not help: somebody has to change something, or the same will happen again."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", as_reason(self.reason))
        object.__setattr__(self, "detail", as_line(_of_any_try(self.detail)))

    @property
    def line(self) -> str:
        """Return `Reason: detail`."""
        return reason_line(self.reason, self.detail)


def as_reason(text: str, default: str = "Unknown") -> str:
    """Return the text as a condition's reason: one word, beginning with a letter."""
    word = _NOT_IN_REASON.sub("", text).lstrip("_0123456789").rstrip("_")
    return word[:MAX_REASON_LENGTH].rstrip("_") or default


def _of_any_try(text: str) -> str:
    """Return the text as it is at every try."""
    for pattern, instead in _OF_ONE_TRY:
        text = pattern.sub(instead, text)
    return text


def as_line(text: str, limit: int = MAX_LINE_LENGTH) -> str:
    """Return the text on one line, without control characters, cut to a length."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(printable.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def reason_line(reason: str, detail: str) -> str:
    """Return `Reason: detail` for `status.reason`."""
    return as_line(f"{reason}: {detail}" if detail else reason)


def find_volume_problem(
    volume: Manifest | None, warnings: Sequence[WarningEvent], cluster: ClusterFacts
) -> Finding | None:
    """Tell why a claim has no volume. One that waits for its first pod is as it should be."""
    if volume is None:
        return None
    phase = (volume.get("status") or {}).get("phase")
    name = volume["metadata"]["name"]
    if phase == "Lost":
        detail = f"the volume behind claim {name} is gone; delete the claim, and it is made and filled again"
        return Finding(stage=Stage.MODEL, reason=VOLUME_LOST, detail=detail, is_final=True)
    if phase != "Pending":
        return None
    has_class = bool((volume.get("spec") or {}).get("storageClassName"))
    has_volume = bool((volume.get("spec") or {}).get("volumeName"))
    failed = find_warning(warnings, "PersistentVolumeClaim", name, ("ProvisioningFailed", "FailedBinding"))
    is_unclassed = not has_class and not has_volume
    if is_unclassed and (cluster.has_default_storage_class is False or _says_no_class(failed)):
        return Finding(
            stage=Stage.MODEL,
            reason=NO_DEFAULT_STORAGE_CLASS,
            detail=STORAGE_CLASS_CURE,
            is_final=True,
        )
    if failed is None:
        return None
    if has_class and f'"{volume["spec"]["storageClassName"]}" not found' in failed.message:
        return _missing_class(volume["spec"]["storageClassName"], cluster)
    return Finding(stage=Stage.MODEL, reason=failed.reason, detail=f"claim {name}: {failed.message}")


def _missing_class(name: str, cluster: ClusterFacts) -> Finding:
    """Say that no StorageClass has the name, and which there are. Of an existing volume it could be a mere label."""
    there = f", which are {', '.join(cluster.storage_classes)}" if cluster.storage_classes else ""
    detail = f"{name}; set spec.cache.storageClassName to one of the cluster's{there}"
    return Finding(stage=Stage.MODEL, reason="StorageClassNotFound", detail=detail, is_final=True)


def _says_no_class(warning: WarningEvent | None) -> bool:
    return warning is not None and "no storage class is set" in warning.message


def find_workload_problem(
    workload: Manifest | None,
    *,
    is_short_of_pods: bool,
    is_rolling: bool = False,
    subject: Subject = Subject.SERVER,
) -> Finding | None:
    """Tell why a workload makes no pods. A refusal is over once the pods are there; a pause only stops what is new.

    `subject` is whose resources a refusal of its pods is about.
    """
    if workload is None or not is_short_of_pods:
        return None
    if is_rolling and (workload.get("spec") or {}).get("paused"):
        name = workload["metadata"]["name"]
        detail = f"Deployment {name} is paused, so that no new pods are made; kubectl rollout resume deployment/{name}"
        return Finding(stage=Stage.WORKLOAD, reason=DEPLOYMENT_PAUSED, detail=detail, is_final=True)
    failure = condition_of(workload, "ReplicaFailure")
    if failure is not None and has_condition(workload, "ReplicaFailure"):
        return _refusal(str(failure.get("message", "")), str(failure.get("reason", "")), subject)
    return None


def find_job_refusal(job: Manifest | None, warnings: Sequence[WarningEvent]) -> Finding | None:
    """Tell why a download Job, which has no pod, gets none."""
    if job is None:
        return None
    failed = find_warning(warnings, "Job", job["metadata"]["name"], ("FailedCreate",))
    return None if failed is None else _refusal(failed.message, failed.reason, Subject.DOWNLOAD, Stage.MODEL)


def _refusal(message: str, reason: str, subject: Subject, stage: Stage = Stage.WORKLOAD) -> Finding:
    known = read_refusal(message, subject)
    if known is None:
        return Finding(stage=stage, reason=reason or "FailedCreate", detail=strip_object(message))
    return Finding(stage=stage, reason=known.reason, detail=known.detail, is_final=known.is_final)


def is_deadline_exceeded(workload: Manifest | None) -> bool:
    """Whether a Deployment says that its rollout has taken too long."""
    if workload is None:
        return False
    progressing = condition_of(workload, "Progressing") or {}
    return progressing.get("status") == "False" and progressing.get("reason") == ROLLOUT_DEADLINE_EXCEEDED
