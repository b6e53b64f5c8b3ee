"""Claims, workloads and Jobs as controllers describe them, and the one line that a user reads."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from status_objects import build_condition

from quire_operator.status.reasons import (
    Finding,
    Stage,
    as_line,
    as_reason,
    find_job_refusal,
    find_volume_problem,
    find_workload_problem,
    is_deadline_exceeded,
)
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import WarningEvent


def _claim(phase: str = "Pending", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "quire-cache-1"}, "spec": spec, "status": {"phase": phase}}


def _claim_warning(reason: str, message: str) -> WarningEvent:
    return WarningEvent(kind="PersistentVolumeClaim", name="quire-cache-1", reason=reason, message=message, time=1.0)


NO_CLASS = _claim_warning("FailedBinding", "no persistent volumes available for this claim and no storage class is set")


@pytest.mark.parametrize(
    ("claim", "has_default", "warnings", "line"),
    [
        (None, False, (), None),
        (_claim(), False, (), "NoDefaultStorageClass: set spec.cache.storageClassName"),
        (_claim(), None, (NO_CLASS,), "NoDefaultStorageClass: set spec.cache.storageClassName"),
        (_claim(), None, (), None),
        (_claim(), True, (), None),
        (_claim(storageClassName="local"), False, (), None),
        (_claim("Bound"), False, (NO_CLASS,), None),
        (
            _claim(storageClassName="fast"),
            True,
            (_claim_warning("ProvisioningFailed", 'storageclass.storage.k8s.io "fast" not found'),),
            "StorageClassNotFound: fast; set spec.cache.storageClassName to one of the cluster's, which are hdd, ssd",
        ),
        (
            _claim("Lost"),
            True,
            (),
            "VolumeLost: the volume behind claim quire-cache-1 is gone; delete the claim, and it is made and filled "
            "again",
        ),
    ],
)
def test_a_claim_without_a_volume(
    claim: Any, has_default: bool | None, warnings: tuple[WarningEvent, ...], line: str | None
) -> None:
    found = find_volume_problem(
        claim, warnings, ClusterFacts(has_default_storage_class=has_default, storage_classes=("hdd", "ssd"))
    )
    assert (found and found.line) == line


QUOTA = (
    'pods "smollm2-7d9c5b6f4d-x2k8p" is forbidden: exceeded quota: gpu, requested: requests.nvidia.com/gpu=1, '
    "used: requests.nvidia.com/gpu=4, limited: requests.nvidia.com/gpu=4"
)
QUOTA_LINE = (
    "QuotaExceeded: exceeded quota: gpu, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=4, "
    "limited: requests.nvidia.com/gpu=4; lower spec.resources, free some of it, or have the quota raised"
)


def _deployment(*conditions: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "Deployment", "metadata": {"name": "smollm2"}, "status": {"conditions": list(conditions)}}


def test_a_quota_is_named_without_the_pod_s_random_name() -> None:
    refused = _deployment(build_condition("ReplicaFailure", "True", "FailedCreate", QUOTA))
    found = find_workload_problem(refused, is_short_of_pods=True)
    assert found is not None
    assert found.line == QUOTA_LINE
    assert find_workload_problem(refused, is_short_of_pods=False) is None
    assert find_workload_problem(_deployment(), is_short_of_pods=True) is None
    assert find_workload_problem(None, is_short_of_pods=True) is None


def test_a_job_without_a_pod() -> None:
    job = {"metadata": {"name": "quire-download-1"}}
    warning = WarningEvent(
        kind="Job",
        name="quire-download-1",
        reason="FailedCreate",
        message='Error creating: pods "quire-download-1-abcde" is forbidden: violates PodSecurity "restricted:latest"',
        time=1.0,
    )
    found = find_job_refusal(job, (warning,))
    assert found is not None
    assert found.line == 'PodSecurityViolation: violates PodSecurity "restricted:latest"'
    assert find_job_refusal(job, ()) is None
    assert find_job_refusal(None, (warning,)) is None


def test_a_rollout_s_deadline() -> None:
    message = 'ReplicaSet "smollm2-7d9c5b6f4d" has timed out progressing.'
    assert is_deadline_exceeded(
        _deployment(build_condition("Progressing", "False", "ProgressDeadlineExceeded", message))
    )
    assert not is_deadline_exceeded(_deployment(build_condition("Progressing", "True", "ReplicaSetUpdated")))
    assert not is_deadline_exceeded(None)


def test_findings_are_ordered_by_their_root() -> None:
    quota = Finding(stage=Stage.WORKLOAD, reason="A", detail="z")
    crash = Finding(stage=Stage.PROCESS, reason="A", detail="a")
    assert min(crash, quota) is quota


@given(st.text())
def test_any_text_becomes_a_reason_and_a_line(text: str) -> None:
    reason, line = as_reason(text), as_line(text, 64)
    assert reason[0].isalpha()
    assert reason.isascii()
    assert len(reason) <= 128
    assert len(line) <= 64
    assert len(line.splitlines()) <= 1
    assert as_reason(reason) == reason
    assert as_line(line, 64) == line
