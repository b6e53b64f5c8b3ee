"""Why one pod is not ready: its scheduling, its containers' images and starts, and how they ended.

Owns the reading of what scheduler, kubelet and container runtime write into a pod, and of the termination messages that
our own processes leave there. Knows neither LLMDeployments nor what a pod is for.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from quire_contract import names
from quire_contract.termination import TerminationMessage, decode_termination
from quire_contract.units import UnitError, format_bytes, parse_quantity
from quire_kube.objects import Manifest
from quire_operator.status.probe_kills import find_probe_kill
from quire_operator.status.reasons import Finding, Stage, as_line
from quire_operator.watch.observed import WarningEvent, find_warning
from quire_operator.watch.pods import (
    SCHEDULER_PATIENCE_S,
    SCHEDULING_PATIENCE_S,
    condition_of,
    container_statuses,
    is_ending,
    is_over,
    is_ready,
    is_running,
    is_scheduled,
    is_without_node,
    why_unscheduled,
    without_node_for_s,
)

OUT_OF_MEMORY: Final = "OutOfMemory"
CRASH_LOOP: Final = "CrashLoop"
CRASHED: Final = "Crashed"
IMAGE_PULL_BACK_OFF: Final = "ImagePullBackOff"

NO_SCHEDULER: Final = "NoScheduler"

_OURS: Final = (names.COMPONENT_SERVER, names.COMPONENT_DOWNLOAD)
"""Containers that need not be named: the only ones that most pods have."""
_DEFAULT_SCHEDULER: Final = "default-scheduler"
_SIGKILL_EXIT: Final = 137
_MAX_TRACEBACK_LINE: Final = 240
_PULL_REASONS: Final = ("ErrImagePull", "ImagePullBackOff")
_IMAGE_REASONS: Final = ("InvalidImageName", "ErrImageNeverPull", "ImageInspectError", "RegistryUnavailable")
_STARTING_REASONS: Final = ("ContainerCreating", "PodInitializing")
_MOUNT_WARNINGS: Final = ("FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox")
_PULL_NOISE: Final = (
    re.compile(r'^Back-off pulling image "[^"]*"(: )?'),
    re.compile(r"^ErrImagePull: "),
    re.compile(r"^rpc error: code = \w+ desc = "),
    re.compile(r'^failed to pull and unpack image "[^"]*": '),
    re.compile(r'^failed to resolve reference "[^"]*": '),
)
_EXCEPTION_LINE: Final = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Failure)\b")


def find_pod_problem(pod: Manifest, warnings: Sequence[WarningEvent], at: float = math.inf) -> Finding | None:
    """Tell the worst that is wrong with a pod; None for one that is ready, or only on its way at that time."""
    if is_ready(pod) or is_ending(pod):
        return None
    found = [_find_container_problem(pod, status, warnings) for status in container_statuses(pod)]
    problems = [finding for finding in found if finding is not None]
    if problems:
        return _of_any_pod(pod, min(problems))
    if is_over(pod):
        problem = _find_pod_failure(pod)
    else:
        problem = _find_scheduling_problem(pod, at) or _find_mount_problem(pod, warnings)
    return None if problem is None else _of_any_pod(pod, problem)


def find_restart_cause(pod: Manifest, warnings: Sequence[WarningEvent]) -> Finding | None:
    """Tell why a pod's container last ended and was started again."""
    ends = ((status, (status.get("lastState") or {}).get("terminated")) for status in container_statuses(pod))
    found = [_naming(pod, status, _find_end(pod, status, end, warnings)) for status, end in ends if end is not None]
    return min(found, default=None)


def _of_any_pod(pod: Manifest, finding: Finding) -> Finding:
    """Leave out the pod's name: the next one has another, and the same trouble."""
    return replace(finding, detail=finding.detail.replace(pod["metadata"]["name"], "the pod"))


def _find_container_problem(
    pod: Manifest, status: Mapping[str, Any], warnings: Sequence[WarningEvent]
) -> Finding | None:
    found = _find_state_problem(pod, status, warnings)
    return None if found is None else _naming(pod, status, found)


def _naming(pod: Manifest, status: Mapping[str, Any], found: Finding) -> Finding:
    """Name the container in what is said of it, where it is not the one that everybody thinks of."""
    name = status.get("name", "")
    if name in _OURS:
        return found
    return replace(found, detail=f"{'init ' if _is_init(pod, status) else ''}container {name}: {found.detail}")


def _is_init(pod: Manifest, status: Mapping[str, Any]) -> bool:
    return any(status is other for other in (pod.get("status") or {}).get("initContainerStatuses") or ())


def _find_state_problem(pod: Manifest, status: Mapping[str, Any], warnings: Sequence[WarningEvent]) -> Finding | None:
    state = status.get("state") or {}
    waiting, ended = state.get("waiting"), state.get("terminated")
    if ended is not None and not _is_good_end(ended, status, pod):
        return _find_end(pod, status, ended, warnings)
    last = (status.get("lastState") or {}).get("terminated")
    if last is not None and not status.get("ready") and ended is None:
        return _find_end(pod, status, last, warnings)
    if waiting is None:
        return None
    return _find_waiting_problem(pod, status, waiting)


def _is_good_end(ended: Mapping[str, Any], status: Mapping[str, Any], pod: Manifest) -> bool:
    """An init container or a Job's container has done its work; a server's has not, whatever its exit code."""
    if ended.get("exitCode") != 0:
        return False
    return _is_init(pod, status) or (pod.get("spec") or {}).get("restartPolicy") in ("Never", "OnFailure")


def _find_waiting_problem(pod: Manifest, status: Mapping[str, Any], waiting: Mapping[str, Any]) -> Finding | None:
    reason, message = str(waiting.get("reason", "")), str(waiting.get("message", ""))
    image = str(status.get("image") or _container_spec(pod, status).get("image", ""))
    if reason in _PULL_REASONS:
        detail = f"{image}: {_pull_cause(message) or 'cannot be pulled'}"
        return Finding(stage=Stage.CONTAINER, reason=IMAGE_PULL_BACK_OFF, detail=detail)
    if reason in _IMAGE_REASONS:
        return Finding(stage=Stage.CONTAINER, reason=reason, detail=f"{image}: {message}", is_final=True)
    if reason in _STARTING_REASONS or not reason:
        return None
    detail = message or f"container {status.get('name', '')} cannot be started"
    return Finding(stage=Stage.CONTAINER, reason=reason, detail=detail)


def _pull_cause(message: str) -> str:
    """Strip what the kubelet and the runtime put before the registry's own words."""
    for noise in _PULL_NOISE:
        message = noise.sub("", message)
    return message


def _find_end(
    pod: Manifest, status: Mapping[str, Any], ended: Mapping[str, Any], warnings: Sequence[WarningEvent]
) -> Finding:
    termination = decode_termination(str(ended.get("message") or ""))
    is_killed_for_memory = ended.get("reason") == "OOMKilled"
    if termination is not None and not (is_killed_for_memory and termination.need_bytes is None):
        return Finding(
            stage=Stage.PROCESS, reason=termination.code, detail=describe_termination(termination), is_final=True
        )
    if is_killed_for_memory:
        limit = _memory_limit(pod, status)
        where = f"its limit of {limit}" if limit else "its memory limit"
        field = "resources.limits.memory" if status.get("name") in _OURS else "its memory limit in spec.podTemplate"
        detail = f"killed at {where}; raise {field}"
        return Finding(stage=Stage.PROCESS, reason=OUT_OF_MEMORY, detail=detail, is_final=True)
    waiting = (status.get("state") or {}).get("waiting") or {}
    is_loop = waiting.get("reason") == "CrashLoopBackOff" or int(status.get("restartCount", 0)) > 1
    killed = find_probe_kill(pod, _container_spec(pod, status), ended, warnings, is_final=is_loop)
    if killed is not None:
        return killed
    detail = last_line(str(ended.get("message") or "")) or _describe_exit(ended)
    return Finding(stage=Stage.PROCESS, reason=CRASH_LOOP if is_loop else CRASHED, detail=detail, is_final=is_loop)


def describe_termination(termination: TerminationMessage) -> str:
    """Return need and have where both are known, else what the process said; then its hint."""
    if termination.need_bytes is not None and termination.have_bytes is not None:
        said = f"needs {format_bytes(termination.need_bytes)}, has {format_bytes(termination.have_bytes)}"
    else:
        said = termination.message.strip()
    hint = termination.hint.strip()
    if not said or not hint:
        return said or hint
    return f"{said.rstrip('.')}; {hint[0].lower()}{hint[1:]}" if hint[1:2].islower() else f"{said.rstrip('.')}; {hint}"


def last_line(text: str) -> str:
    """Return the line of a log's end that says most: the exception of the last traceback, else the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    if starts:
        for line in lines[starts[-1] + 1 :]:
            if line[:1] not in (" ", "\t", "+", "|"):
                return as_line(line, _MAX_TRACEBACK_LINE)
    exceptions = [line for line in lines if _EXCEPTION_LINE.match(line)]
    chosen = exceptions[-1:] or lines[-1:]
    return as_line(chosen[0], _MAX_TRACEBACK_LINE) if chosen else ""


def _describe_exit(ended: Mapping[str, Any]) -> str:
    exit_code = ended.get("exitCode")
    if exit_code == _SIGKILL_EXIT:
        return "killed (SIGKILL) without a word; its log may say why"
    if ended.get("signal"):
        return f"ended by signal {ended['signal']} without a word; its log may say why"
    return f"ended with exit code {exit_code} without a word; its log may say why"


def _memory_limit(pod: Manifest, status: Mapping[str, Any]) -> str:
    limits = (_container_spec(pod, status).get("resources") or {}).get("limits") or {}
    try:
        return format_bytes(int(parse_quantity(limits["memory"]))).replace(".0 ", " ")
    except (KeyError, UnitError):
        return ""


def _container_spec(pod: Manifest, status: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = pod.get("spec") or {}
    listed = (*(spec.get("initContainers") or ()), *(spec.get("containers") or ()))
    return next((container for container in listed if container.get("name") == status.get("name")), {})


def _find_pod_failure(pod: Manifest) -> Finding | None:
    status = pod.get("status") or {}
    if status.get("phase") != "Failed":
        return None
    reason = str(status.get("reason") or "PodFailed")
    return Finding(stage=Stage.SCHEDULING, reason=reason, detail=str(status.get("message") or "the pod has failed"))


def _find_scheduling_problem(pod: Manifest, at: float) -> Finding | None:
    """Tell why a pod has no node, once that has lasted: on a healthy start it may be so for a moment."""
    found, waited_s = why_unscheduled(pod), without_node_for_s(pod, at)
    if found is not None and waited_s >= SCHEDULING_PATIENCE_S:
        return Finding(stage=Stage.SCHEDULING, reason=found.reason, detail=found.message)
    is_created = "creationTimestamp" in pod["metadata"]
    is_unseen = is_created and is_without_node(pod) and condition_of(pod, "PodScheduled") is None
    if not is_unseen or waited_s < SCHEDULER_PATIENCE_S:
        return None
    scheduler = (pod.get("spec") or {}).get("schedulerName") or _DEFAULT_SCHEDULER
    cure = "see whether kube-scheduler runs"
    if scheduler != _DEFAULT_SCHEDULER:
        cure = "correct schedulerName in spec.podTemplate, or see whether that scheduler runs"
    detail = f"no scheduler called {scheduler} has looked at the pod; {cure}"
    return Finding(stage=Stage.SCHEDULING, reason=NO_SCHEDULER, detail=detail)


def _find_mount_problem(pod: Manifest, warnings: Sequence[WarningEvent]) -> Finding | None:
    if not is_scheduled(pod) or is_running(pod):
        return None
    failed = find_warning(warnings, "Pod", pod["metadata"]["name"], _MOUNT_WARNINGS)
    if failed is None:
        return None
    return Finding(stage=Stage.CONTAINER, reason=failed.reason, detail=failed.message)
