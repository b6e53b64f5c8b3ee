"""Was a container ended by the kubelet, because a probe failed? Its exit code cannot say; the pod's own Events do.

Reads `Killing`, `Unhealthy` and `FailedPreStopHook` as the kubelet words them, beside the probe in the pod's spec,
whose budget has run out. An Event speaks of the run of the container in which it was written, and of no other.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from quire_contract import names
from quire_kube.objects import Manifest
from quire_kube.times import parse_time
from quire_operator.status.reasons import Finding, Stage
from quire_operator.watch.observed import WarningEvent

STARTUP_PROBE_FAILED: Final = "StartupProbeFailed"
LIVENESS_PROBE_FAILED: Final = "LivenessProbeFailed"

_KILLING: Final = re.compile(r"^(?:Init c|C)ontainer (?P<container>\S+) failed (?P<probe>startup|liveness) probe\b")
_UNHEALTHY: Final = re.compile(
    r"^(?P<probe>Startup|Liveness) probe (?:failed|errored(?: and resulted in \w+ state)?):\s*(?P<why>.*)$", re.DOTALL
)
_REQUEST: Final = re.compile(r'^Get "https?://[^/"]+(?P<path>[^"]*)": ')
_DIAL: Final = re.compile(r"\bdial tcp \S+: (?:connect: )?")
_WORDS: Final = {
    "startup": (STARTUP_PROBE_FAILED, "was not up", "raise"),
    "liveness": (LIVENESS_PROBE_FAILED, "did not answer", "see its log, or raise"),
}
_DEFAULT_PERIOD_S: Final = 10
_DEFAULT_THRESHOLD: Final = 3


def find_probe_kill(
    pod: Manifest,
    container: Mapping[str, Any],
    ended: Mapping[str, Any],
    warnings: Sequence[WarningEvent],
    *,
    is_final: bool,
) -> Finding | None:
    """Tell which probe ended a container, after how long, and what gives it longer; None where none did."""
    name = str(container.get("name", ""))
    said = _events_of_run(pod, name, ended, warnings)
    kills = (found for warning in said if warning.reason == "Killing" and (found := _KILLING.match(warning.message)))
    probe = next((kill["probe"] for kill in kills if kill["container"] == name), None)
    if probe is None:
        return None
    reason, failing, verb = _WORDS[probe]
    why = _why(probe, said)
    hook = "; its preStop hook failed" if any(warning.reason == "FailedPreStopHook" for warning in said) else ""
    who = "the server" if name == names.COMPONENT_SERVER else "it"
    cure = f"{verb} {probe}Probe.failureThreshold in spec.podTemplate"
    detail = f"{who} {failing} within {_budget(container, probe)}{why}, so it was ended{hook}; {cure}"
    return Finding(stage=Stage.PROCESS, reason=reason, detail=detail, is_final=is_final)


def _events_of_run(
    pod: Manifest, container: str, ended: Mapping[str, Any], warnings: Sequence[WarningEvent]
) -> list[WarningEvent]:
    """Return the pod's Events about one run of a container, the newest first."""
    since = parse_time(ended.get("startedAt")) or 0.0
    name = pod["metadata"]["name"]
    said = [
        warning
        for warning in warnings
        if (warning.kind, warning.name) == ("Pod", name)
        and warning.container in ("", container)
        and warning.time >= since
    ]
    return sorted(said, key=lambda warning: (warning.time, warning.message), reverse=True)


def _why(probe: str, said: Sequence[WarningEvent]) -> str:
    """Return what the probe met, without the pod's address, which is another at each try."""
    for warning in said:
        found = _UNHEALTHY.match(warning.message) if warning.reason == "Unhealthy" else None
        if found is not None and found["probe"].lower() == probe:
            text = _DIAL.sub("", _REQUEST.sub(r"\g<path>: ", found["why"])).strip()
            return f" ({text})" if text else ""
    return ""


def _budget(container: Mapping[str, Any], probe: str) -> str:
    """Return for how long the probe may fail, as the container's spec has it."""
    fields = container.get(f"{probe}Probe") or {}
    period, threshold = fields.get("periodSeconds", _DEFAULT_PERIOD_S), fields.get("failureThreshold")
    return f"{fields.get('initialDelaySeconds', 0) + period * (threshold or _DEFAULT_THRESHOLD)} s"
