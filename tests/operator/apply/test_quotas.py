"""A quota that refuses an object is no trouble of rights: it is said as what it is, with its numbers and a cure."""

import pytest

from quire_kube.api import error_from
from quire_kube.objects import Kind, Ref
from quire_operator.apply.apply import Refusal
from quire_operator.spec.kinds import DEPLOYMENT, JOB, PERSISTENT_VOLUME_CLAIM, SERVICE
from quire_operator.status.reasons import as_line, reason_line
from quire_operator.status.status import MAX_COLUMN_LENGTH


@pytest.mark.parametrize(
    ("kind", "quota", "cure"),
    [
        (PERSISTENT_VOLUME_CLAIM, "requests.storage", "lower spec.cache.size"),
        (JOB, "count/jobs.batch", "delete jobs that nobody needs"),
        (DEPLOYMENT, "count/deployments.apps", "delete deployments that nobody needs"),
        (SERVICE, "services", "delete services that nobody needs"),
    ],
)
def test_a_quota_is_said_with_its_numbers(kind: Kind, quota: str, cure: str) -> None:
    numbers = f"exceeded quota: small, requested: {quota}=1, used: {quota}=3, limited: {quota}=3"
    text = f'{kind.plural} "a" is forbidden: {numbers}'
    ref = Ref(kind=kind, namespace="default", name="quire-download-12345678")
    told = Refusal(ref=ref, error=error_from(403, {"message": text}, "create", str(ref))).as_verdict()
    assert (told.holds, told.reason) == (False, "QuotaExceeded")
    assert told.message.startswith(f"{ref}: {numbers}; {cure}")
    column = as_line(reason_line(told.reason, told.message), MAX_COLUMN_LENGTH)
    assert numbers in column, "the column that people look at is not cut before the numbers"


def test_a_right_that_is_missing_is_still_one() -> None:
    text = (
        'jobs.batch "a" is forbidden: User "x" cannot create resource "jobs" in API group "batch" in the namespace "n"'
    )
    ref = Ref(kind=JOB, namespace="default", name="a")
    told = Refusal(ref=ref, error=error_from(403, {"message": text}, "create", str(ref))).as_verdict()
    assert told.reason == "Forbidden"
    assert "lacks the rule" in told.message
