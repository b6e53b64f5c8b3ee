"""Why an admission refused an object. The words are a real API server's (`e2e/test_refusals_of_a_namespace.py`)."""

import pytest

from quire_operator.plan.admission import AdmissionRefusal, Subject, read_refusal

FULL = "exceeded quota: small, requested: {}, used: {}, limited: {}"
SERVER, DOWNLOAD, CLAIM, OTHER = Subject.SERVER, Subject.DOWNLOAD, Subject.CLAIM, Subject.OTHER


def refusal(kind: str, why: str) -> str:
    return f'create Kind ns/x: {kind} "x-1a2b3" is forbidden: {why}'


@pytest.mark.parametrize(
    ("kind", "requested", "subject", "cure"),
    [
        ("persistentvolumeclaims", "requests.storage", CLAIM, "lower spec.cache.size or take a claim that is there"),
        ("persistentvolumeclaims", "gold.storageclass.storage.k8s.io/requests.storage", CLAIM, "lower spec.cache.size"),
        (
            "persistentvolumeclaims",
            "gold.storageclass.storage.k8s.io/persistentvolumeclaims",
            CLAIM,
            "delete persistentvolumeclaims that nobody needs, or have the quota raised",
        ),
        ("jobs.batch", "count/jobs.batch", DOWNLOAD, "delete jobs that nobody needs, or have the quota raised"),
        ("deployments.apps", "count/deployments.apps", SERVER, "delete deployments that nobody needs"),
        ("services", "services", OTHER, "delete services that nobody needs"),
        ("pods", "requests.nvidia.com/gpu", SERVER, "lower spec.resources, free some of it, or have the quota raised"),
        ("pods", "limits.cpu", DOWNLOAD, "lower spec.download.resources"),
    ],
)
def test_a_quota_that_is_used_up_is_said_with_its_numbers_and_what_frees_enough(
    kind: str, requested: str, subject: Subject, cure: str
) -> None:
    numbers = FULL.format(f"{requested}=9", f"{requested}=1", f"{requested}=4")
    found = read_refusal(refusal(kind, numbers), subject)
    assert found is not None
    assert (found.reason, found.is_final) == ("QuotaExceeded", False)
    assert found.detail.startswith(f"{numbers}; {cure}")


def test_a_quota_that_wants_a_limit_says_which_field() -> None:
    why = "failed quota: small: must specify limits.cpu for: server; limits.memory for: server"
    found = read_refusal(refusal("pods", why), SERVER)
    detail = f"{why}; set limits.cpu and limits.memory in spec.resources"
    assert found == AdmissionRefusal(reason="QuotaNeedsResources", detail=detail, is_final=True)


@pytest.mark.parametrize(
    ("containers", "where"),
    [
        ("limits.cpu for: istio-proxy", "set limits.cpu for container istio-proxy, in spec.podTemplate or by what"),
        (
            "limits.cpu for: a,server; limits.memory for: b",
            "set limits.cpu in spec.resources, and set limits.cpu for container a",
        ),
        ("limits.cpu", "set limits.cpu in spec.resources"),
    ],
)
def test_a_container_beside_ours_has_its_resources_elsewhere(containers: str, where: str) -> None:
    """A quota names the containers (resourcequota's admission: `must specify limits.cpu for: a,b; …`)."""
    found = read_refusal(refusal("pods", f"failed quota: small: must specify {containers}"), SERVER)
    assert found is not None
    assert f"; {where}" in found.detail


@pytest.mark.parametrize(
    "why",
    [
        "maximum memory usage per Container is 1Gi, but limit is 2Gi",
        "[minimum cpu usage per Container is 100m, but request is 50m, maximum cpu usage per Pod is 1, but limit is 2]",
        "maximum cpu usage per Container is 1.  No limit is specified",
        "cpu max limit to request ratio per Container is 2, but provided ratio is 4.000000",
    ],
)
def test_a_limit_range_is_named_with_its_numbers(why: str) -> None:
    found = read_refusal(refusal("pods", why), SERVER)
    assert found is not None
    assert (found.reason, found.is_final) == ("LimitRangeExceeded", True)
    assert found.detail == f"a LimitRange of the namespace says: {why.strip('[]')}; bring spec.resources within it"


def test_a_quota_that_is_being_counted_is_waited_for() -> None:
    found = read_refusal(refusal("pods", "status unknown for quota: small, resources: pods"), SERVER)
    assert found is not None
    assert (found.reason, found.is_final) == ("QuotaExceeded", False)


@pytest.mark.parametrize(
    "text",
    [
        'services "a" is forbidden: User "system:serviceaccount:q:q" cannot patch resource "services" in API group ""',
        'admission webhook "policy.example.com" denied the request: no',
        "",
    ],
)
def test_what_others_refuse_is_not_guessed_at(text: str) -> None:
    assert read_refusal(text, SERVER) is None
