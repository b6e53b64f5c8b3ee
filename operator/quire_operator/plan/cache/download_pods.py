"""What the pods of a download Job tell: the facts of the model, why an attempt failed, or what one waits for.

Reads pods; decides nothing. The newest pod speaks, but one that has not got further than the failed one before it does
not yet take the failure back: a condition should not change with every retry.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from quire_contract import model_facts, names
from quire_contract.model_facts import ModelFacts, decode_facts
from quire_contract.termination import TerminationMessage, decode_termination
from quire_contract.units import format_bytes
from quire_kube.objects import Manifest
from quire_kube.times import parse_time
from quire_operator.plan.actions import Verdict
from quire_operator.plan.cache.volumes import Shortage
from quire_operator.plan.resources.download.options import CA_VOLUME
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.watch.observed import Observed, WarningEvent, find_warning
from quire_operator.watch.pods import (
    SCHEDULING_PATIENCE_S,
    VOLUME_NOT_BOUND,
    is_ending,
    unschedulable_condition,
    why_unscheduled,
    without_node_for_s,
)

_IMAGE_REASONS: Final = frozenset({"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"})
_CONFIG_REASONS: Final = frozenset({"CreateContainerConfigError", "CreateContainerError"})
_MISSING: Final = re.compile(r'(?P<kind>secret|configmap)s? (?:"|[a-z0-9-]+/)(?P<name>[a-z0-9.-]+)')
"""In what a kubelet says: `secret "hf" not found`, `couldn't find key token in Secret ns/hf`."""
SECRET_MISSING: Final = "SecretMissing"
CONFIG_MAP_MISSING: Final = "ConfigMapMissing"
_CA_FIELD: Final = "spec.download.caBundle (download.caBundle in the operator's settings, for all models)"
_MAX_LOG_CHARACTERS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadFailure:
    """An attempt that failed, in the words of its pod."""

    code: str
    message: str
    hint: str = ""
    shortage: Shortage | None = None
    time: float | None = None


def pods_of_job(observed: Observed) -> tuple[Manifest, ...]:
    """Return the pods of the Job that there is now, oldest first; those of one deleted before say nothing any more."""
    if observed.job is None:
        return ()
    uid = observed.job["metadata"].get("uid")
    pods = [pod for pod in observed.job_pods if _owner_uid(pod) in (uid, None)]
    return tuple(
        sorted(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", pod["metadata"]["name"]))
    )


def find_facts(pods: Sequence[Manifest]) -> ModelFacts | None:
    """Return what a successful pod has found."""
    for pod in reversed(pods):
        if _phase(pod) == "Succeeded":
            facts = decode_facts((_terminated(pod) or {}).get("message") or "")
            if facts is not None:
                return facts
    return None


def find_failure(pods: Sequence[Manifest]) -> DownloadFailure | None:
    """Return why the last attempt that failed did."""
    failed = [pod for pod in pods if _phase(pod) == "Failed" and not is_ending(pod)]
    if not failed:
        return None
    ended_at = parse_time((_terminated(failed[-1]) or {}).get("finishedAt"))
    return replace(_read_failure(failed[-1]), time=ended_at)


def find_obstacle(
    pods: Sequence[Manifest], deployment: LLMDeployment, at: float, warnings: Sequence[WarningEvent] = ()
) -> Verdict | None:
    """Return what keeps the newest pod from starting: a Secret or ConfigMap, its image, or (for long) the scheduler."""
    if not pods or _phase(pods[-1]) != "Pending":
        return None
    unschedulable = unschedulable_condition(pods[-1])
    if unschedulable is not None and without_node_for_s(pods[-1], at) < SCHEDULING_PATIENCE_S:
        return None
    if unschedulable is not None:
        is_for_volume = (found := why_unscheduled(pods[-1])) is not None and found.reason == VOLUME_NOT_BOUND
        message = unschedulable.get("message", "")
        if is_for_volume:  # a scheduler looks again some seconds after the volume is there
            return _no("VolumePending", f"The download waits for its volume: {message}")
        return _no("DownloadUnschedulable", f"The download finds no node: {message}")
    waiting = (_container_state(pods[-1]).get("waiting")) or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _CONFIG_REASONS and (missing := _MISSING.search(message.lower())) is not None:
        return _missing(missing["kind"], missing["name"], message, deployment)
    if reason in _CONFIG_REASONS or reason in _IMAGE_REASONS:
        return _no("ImagePullBackOff" if reason in _IMAGE_REASONS else reason, f"The download cannot start: {message}")
    return _find_missing_authorities(pods[-1], warnings)


def _find_missing_authorities(pod: Manifest, warnings: Sequence[WarningEvent]) -> Verdict | None:
    """Tell that what is to be trusted is not there: a mount that fails leaves no word in the pod itself."""
    failed = find_warning(warnings, "Pod", pod["metadata"]["name"], ("FailedMount",))
    if failed is None or f'volume "{CA_VOLUME}"' not in failed.message:
        return None
    missing = _MISSING.search(failed.message.lower())
    return None if missing is None else _wait_for(missing["kind"], "its authorities", failed.message, _CA_FIELD)


def _missing(kind: str, name: str, message: str, deployment: LLMDeployment) -> Verdict:
    """Say which field names the object that a variable is read from; an administrator may have named it for all."""
    ref = deployment.spec.model.token_secret_ref
    if kind == "secret" and ref is not None and name == ref.name:
        what, field = "its token", "spec.model.tokenSecretRef"
    else:
        what, field = "its variables", "spec.download (download in the operator's settings, for all models)"
    return _wait_for(kind, what, message, field)


def _wait_for(kind: str, what: str, message: str, field: str) -> Verdict:
    reason = SECRET_MISSING if kind == "secret" else CONFIG_MAP_MISSING
    return _no(reason, f"The download waits for {what}: {message}; create it, or correct {field}.")


def unschedulable_since(pods: Sequence[Manifest]) -> float | None:
    """Return since when the newest pod finds no node (0.0 where that is not known); None while it is not so."""
    if not pods or _phase(pods[-1]) != "Pending":
        return None
    condition = unschedulable_condition(pods[-1])
    return None if condition is None else parse_time(condition.get("lastTransitionTime")) or 0.0


def is_under_way(pods: Sequence[Manifest], observed: Observed) -> bool:
    """Whether the newest pod has got as far as listing the files, which refutes what failed before it."""
    progress = observed.progress
    is_running = bool(pods) and _phase(pods[-1]) == "Running"
    return is_running and progress is not None and progress.total_bytes is not None


def describe_failure(failure: DownloadFailure, deployment: LLMDeployment, cure: str) -> Verdict:
    """Put a failure into a condition's words. `cure` is the volume's, for a shortage."""
    if failure.shortage is not None:
        need, have = failure.shortage.need_bytes, failure.shortage.have_bytes
        what = failure.message if need is None else f"needs {format_bytes(need)}, has {format_bytes(have or 0)} free"
        return _no(failure.code, f"{what}; {cure or 'set a larger spec.cache.size'}")
    hint = failure.hint or (_gated_hint(deployment) if failure.code == model_facts.MODEL_GATED else "")
    if failure.code == model_facts.SOURCE_UNREACHABLE:
        hint = f"{hint} It is tried again.".strip()
    return _no(failure.code, f"{failure.message} {hint}".strip())


def _gated_hint(deployment: LLMDeployment) -> str:
    ref = deployment.spec.model.token_secret_ref
    if ref is None:
        return "Set spec.model.tokenSecretRef to a Secret with a token that may read the model."
    return f"The token in Secret {ref.name}, key {ref.key}, may not read the model; ask for access, or use another."


def _read_failure(pod: Manifest) -> DownloadFailure:
    ended = _terminated(pod) or {}
    text = ended.get("message") or ""
    told = decode_termination(text)
    if told is not None:
        return DownloadFailure(code=told.code, message=told.message, hint=told.hint, shortage=_shortage(pod, told))
    status = pod.get("status") or {}
    if ended.get("reason") == "OOMKilled":
        message = "The download was killed for want of memory."
        hint = "Raise spec.download.resources.limits.memory."
        return DownloadFailure(code=model_facts.DOWNLOAD_FAILED, message=message, hint=hint)
    last_line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    exit_code = f"exit code {ended['exitCode']}" if "exitCode" in ended else ""
    why = status.get("message") or last_line or exit_code or status.get("reason") or "no reason is known"
    return DownloadFailure(
        code=model_facts.DOWNLOAD_FAILED, message=f"The download failed: {why[:_MAX_LOG_CHARACTERS]}"
    )


def _shortage(pod: Manifest, told: TerminationMessage) -> Shortage | None:
    if told.code != model_facts.NO_SPACE:
        return None
    return Shortage(pod_uid=pod["metadata"].get("uid", ""), need_bytes=told.need_bytes, have_bytes=told.have_bytes)


def _phase(pod: Manifest) -> str:
    return str((pod.get("status") or {}).get("phase", "Pending"))


def _container_state(pod: Manifest) -> dict[str, Any]:
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    ours = [status for status in statuses if status.get("name") == names.COMPONENT_DOWNLOAD] or statuses
    return (ours[0].get("state") or {}) if ours else {}


def _terminated(pod: Manifest) -> dict[str, Any] | None:
    return _container_state(pod).get("terminated")


def _owner_uid(pod: Manifest) -> str | None:
    owners = pod["metadata"].get("ownerReferences") or []
    return next((owner.get("uid") for owner in owners if owner.get("kind") == "Job"), None)


def _no(reason: str, message: str) -> Verdict:
    return Verdict(holds=False, reason=reason, message=message)
