"""What an admission says when it refuses an object: a quota, a LimitRange or Pod Security, with its numbers and a cure.

Reads the words of Kubernetes' own admission plugins (resourcequota, limitranger, podsecurity); whatever else refuses is
not known here. Knows no object but by what it is for. Invariant: a pod's random name is left out.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from quire_contract import names

QUOTA_EXCEEDED: Final = "QuotaExceeded"
QUOTA_NEEDS_RESOURCES: Final = "QuotaNeedsResources"
LIMIT_RANGE: Final = "LimitRangeExceeded"
POD_SECURITY: Final = "PodSecurityViolation"

_FORBIDDEN: Final = re.compile(r'^.*?(?P<object>[a-z.]+) "[^"]*" is forbidden: (?P<why>.*)$', re.DOTALL)
_CREATING: Final = "Error creating: "
_REQUESTED: Final = re.compile(r"requested: (?P<what>.*?), used: ")
_UNSAID: Final = re.compile(r"must specify (?P<what>.*)")
_RANGE: Final = re.compile(
    r"(maximum|minimum) \S+ usage per \w+ is |max limit to request ratio per \w+ is ", re.IGNORECASE
)
_OUR_CONTAINERS: Final = (names.COMPONENT_SERVER, names.COMPONENT_DOWNLOAD, "")
"""The last where an admission names none."""


class Subject(Enum):
    """Which of an LLMDeployment's objects was refused: each has other fields that cure it. The value is who says so."""

    SERVER = "spec.resources"
    SERVER_OF_PROFILE = "the server's resources in spec.podTemplate"
    """Beside a profile, spec.resources may not stand."""
    DOWNLOAD = "spec.download.resources"
    CLAIM = "spec.cache.size"
    OTHER = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRefusal:
    """Why an object was refused, as a word, and a line with the numbers and what to do."""

    reason: str
    detail: str
    is_final: bool = False
    """It will be refused again, until somebody changes something."""


def read_refusal(message: str, subject: Subject) -> AdmissionRefusal | None:
    """Return what an admission refused an object for; None where it was none of the known ones."""
    why = strip_object(message)
    if "exceeded quota" in why:
        return AdmissionRefusal(reason=QUOTA_EXCEEDED, detail=f"{why}; {_cure_quota(why, subject)}")
    if "failed quota" in why or "insufficient quota" in why:
        return _read_incomplete(why, subject)
    if "status unknown for quota" in why:
        return AdmissionRefusal(reason=QUOTA_EXCEEDED, detail=f"{why}; it is new, and being counted")
    if _RANGE.search(why):
        where = subject.value or "it"
        detail = f"a LimitRange of the namespace says: {why.strip('[]')}; bring {where} within it"
        return AdmissionRefusal(reason=LIMIT_RANGE, detail=detail, is_final=True)
    if "violates PodSecurity" in why:
        return AdmissionRefusal(reason=POD_SECURITY, detail=why, is_final=True)
    return None


def strip_object(message: str) -> str:
    """Return a refusal without what was refused: its name may be a pod's random one."""
    found = _FORBIDDEN.match(message)
    return (found["why"] if found else message.removeprefix(_CREATING)).strip()


def _cure_quota(why: str, subject: Subject) -> str:
    """Say what frees enough of a quota, by what of it was requested."""
    found = _REQUESTED.search(why)
    requested = [item.partition("=")[0] for item in found["what"].split(",")] if found else []
    counts = [name for name in requested if _is_count(name)]
    raise_it = "or have the quota raised"
    if counts and len(counts) == len(requested):
        return f"delete {' and '.join(map(_counted, counts))} that nobody needs, {raise_it}"
    if subject is Subject.OTHER:
        return f"free some of it, {raise_it}"
    further = " or take a claim that is there (spec.cache.existingClaim)" if subject is Subject.CLAIM else ""
    return f"lower {subject.value}{further}, free some of it, {raise_it}"


def _is_count(name: str) -> bool:
    """Whether a quota's resource counts objects: count/jobs.batch, pods, <class>.….k8s.io/persistentvolumeclaims."""
    return name.startswith("count/") or name.rpartition("/")[2] in _COUNTED


_COUNTED: Final = frozenset(
    {
        *("pods", "services", "persistentvolumeclaims", "secrets", "configmaps", "replicationcontrollers"),
        *("resourcequotas", "services.loadbalancers", "services.nodeports"),
    }
)


def _counted(name: str) -> str:
    return name.removeprefix("count/").rpartition("/")[2].partition(".")[0]


def _read_incomplete(why: str, subject: Subject) -> AdmissionRefusal:
    """A quota on limits or requests refuses a pod in which a container has none."""
    found = _UNSAID.search(why)
    cure = "have the quota's administrator say what it is for"
    if found is not None and subject is not Subject.OTHER:
        cure = _cure_incomplete(found["what"], subject)
    return AdmissionRefusal(reason=QUOTA_NEEDS_RESOURCES, detail=f"{why}; {cure}", is_final=True)


def _cure_incomplete(unsaid: str, subject: Subject) -> str:
    """Say where what a quota misses is set: for our container in the spec, for one beside it where that is from."""
    missing: dict[str, set[str]] = {}
    for part in unsaid.split(";"):
        resources, _, containers = part.partition(" for:")
        for container in containers.split(","):
            missing.setdefault(container.strip(), set()).update(name.strip() for name in resources.split(","))
    ours = set().union(*(missing.pop(name, ()) for name in _OUR_CONTAINERS))
    cures = [f"set {_listed(ours)} in {subject.value}"] if ours else []
    cures += [
        f"set {_listed(resources)} for container {name}, in spec.podTemplate or by what has added it"
        for name, resources in sorted(missing.items())
    ]
    return ", and ".join(cures)


def _listed(resources: Iterable[str]) -> str:
    return " and ".join(sorted(resources))
