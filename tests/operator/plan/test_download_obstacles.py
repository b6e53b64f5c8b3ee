"""When a download's pod that has no node is trouble: not on a healthy start, and not for want of its own volume."""

import pytest

from quire_kube.objects import Manifest
from quire_kube.times import parse_time
from quire_operator.plan.cache.download_pods import find_obstacle
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.watch.observed import WarningEvent

DEPLOYMENT = LLMDeployment.from_manifest(
    {"metadata": {"name": "m"}, "spec": {"model": {"uri": "hf://a/b"}, "resources": {"limits": {"cpu": "1"}}}}
)
SINCE = "2026-01-31T12:00:00Z"
AT = parse_time(SINCE) or 0.0
NO_ROOM = "0/1 nodes are available: 1 Insufficient cpu."
NO_VOLUME = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"


def _waiting(message: str) -> Manifest:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    status = {"phase": "Pending", "conditions": [condition | {"lastTransitionTime": SINCE}]}
    return {"metadata": {"name": "quire-download-0-x7k2p"}, "spec": {}, "status": status}


@pytest.mark.parametrize(
    ("message", "age_s", "reason"),
    [
        (NO_ROOM, 8, None),
        (NO_ROOM, 12, "DownloadUnschedulable"),
        (NO_VOLUME, 8, None),
        (NO_VOLUME, 60, "VolumePending"),
    ],
)
def test_what_keeps_a_download_from_its_node(message: str, age_s: float, reason: str | None) -> None:
    found = find_obstacle((_waiting(message),), DEPLOYMENT, AT + age_s)
    assert (None if found is None else found.reason) == reason


@pytest.mark.parametrize(
    ("volume", "kind", "named", "reason", "field"),
    [
        ("ca", "configmap", "corp-ca", "ConfigMapMissing", "spec.download.caBundle"),
        ("ca", "secret", "corp-ca", "SecretMissing", "spec.download.caBundle"),
        ("model", "secret", "nfs", None, ""),
    ],
)
def test_authorities_that_are_not_there_are_named_with_their_field(
    volume: str, kind: str, named: str, reason: str | None, field: str
) -> None:
    """The words are the kubelet's (`MountVolume.SetUp failed for volume …`): such a pod has no state that says so."""
    message = f'MountVolume.SetUp failed for volume "{volume}" : {kind} "{named}" not found'
    pod = {"metadata": {"name": "quire-download-0-x7k2p"}, "spec": {}, "status": {"phase": "Pending"}}
    warnings = [
        WarningEvent(kind="Pod", name=name, reason="FailedMount", message=message, time=AT)
        for name in ("quire-download-0-x7k2p", "another")
    ]
    found = find_obstacle((pod,), DEPLOYMENT, AT, warnings[:1])
    assert (None if found is None else found.reason) == reason
    assert found is None or (f'{kind} "{named}" not found' in found.message and field in found.message)
    assert find_obstacle((pod,), DEPLOYMENT, AT, warnings[1:]) is None
