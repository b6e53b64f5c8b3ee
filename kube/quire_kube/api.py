"""What is asked of the Kubernetes API, and the errors it can answer with.

A Protocol, so that decisions are tested without a server; `client.py` speaks HTTP. Knows no HTTP library, no cache
and no decision. Whoever catches a `KubeError` may tell by its type what to do: every one but `InvalidError`,
`ForbiddenError` and `NamespaceTerminatingError` goes away by trying again.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

from quire_contract import names
from quire_kube.objects import Kind, Manifest, Ref

Manifests = list[Manifest]


class KubeError(Exception):
    """The API server did not do what it was asked to."""


class NotFoundError(KubeError):
    """There is no such object, or the cluster has no such kind."""


class ConflictError(KubeError):
    """The object has changed since it was read, or is another incarnation."""


class AlreadyExistsError(ConflictError):
    """An object of this name is there already."""


class ForbiddenError(KubeError):
    """A role does not allow it, or admission (a quota, pod security, a policy) refused. The message names the cure."""


class InvalidError(KubeError):
    """The API server refuses the document. `fields` says what is wrong with which."""

    def __init__(self, message: str, fields: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.fields = fields


class MistypedError(InvalidError):
    """The document is none of its kind: a field that the kind lacks, or of another type, or a list's key twice."""


class NameTakenError(KubeError):
    """An object of the wanted name is somebody else's. Nothing tells when it goes: what is not ours is not watched."""

    retry_within_s: Final = 5.0


class NamespaceTerminatingError(KubeError):
    """The namespace is being deleted: nothing can be created there any more."""


class UnavailableError(KubeError):
    """No answer, or none that says anything about the request: refused connection, time-out, 429, 5xx."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnreachableError(UnavailableError):
    """Nobody answers; the next request would fare no better."""


class Kube(Protocol):
    """One API server. Every method may raise any `KubeError`; returned manifests are the caller's."""

    async def apply(self, manifest: Manifest) -> Manifest:
        """Server-side apply as `names.FIELD_MANAGER`, taking over fields that others have set."""
        ...

    async def apply_status(self, manifest: Manifest) -> Manifest:
        """The same with the status; nothing else of the manifest but its name (and uid, as precondition) counts."""
        ...

    async def merge_patch(self, ref: Ref, patch: Mapping[str, Any], *, subresource: str | None = None) -> Manifest:
        """JSON merge patch."""
        ...

    async def create(self, manifest: Manifest, *, manager: str = names.FIELD_MANAGER) -> Manifest:
        """Create as `manager`; raises AlreadyExistsError."""
        ...

    async def replace(self, manifest: Manifest, *, manager: str = names.FIELD_MANAGER) -> Manifest:
        """Put the whole object; raises ConflictError unless its resourceVersion is the newest.

        What that changes has `manager` as one more owner, whatever is applied later.
        """
        ...

    async def get(self, ref: Ref) -> Manifest | None:
        """Return the object, or None."""
        ...

    async def list(
        self,
        kind: Kind,
        namespace: str | None = None,
        label_selector: str | None = None,
        field_selector: str | None = None,
    ) -> Manifests:
        """Return all objects of a kind, of one namespace or of all."""
        ...

    async def delete(self, ref: Ref, uid: str) -> None:
        """Delete this incarnation, its dependents in the background; gone already is as good."""
        ...

    async def raw_get(self, path: str) -> Any:
        """Return the JSON at a path of the API server, such as /version."""
        ...


def error_from(code: int, status: Mapping[str, Any], verb: str, what: str, retry_after: str | None = None) -> KubeError:
    """Make the error that an answer stands for.

    Args:
        code: the HTTP status.
        status: the body, a `v1 Status` where the API server itself answered; may be empty.
        verb: as RBAC names it.
        what: what was asked for, such as `Service default/smollm2`.
        retry_after: the header, in seconds.
    """
    details = status.get("details") or {}
    causes = details.get("causes") or []
    text = status.get("message") or ""
    message = f"{verb} {what}: {text or f'HTTP {code}'}"
    if any(cause.get("reason") == "NamespaceTerminating" for cause in causes):
        return NamespaceTerminatingError(message)
    if code == 403:
        return ForbiddenError(message + _missing_rule(text))
    if code == 404:
        is_namespace_gone = details.get("kind") == "namespaces"
        return NamespaceTerminatingError(message) if is_namespace_gone else NotFoundError(message)
    if code == 409:
        is_there = status.get("reason") == "AlreadyExists"
        return AlreadyExistsError(message) if is_there else ConflictError(message)
    if code in (400, 413, 422):
        return InvalidError(message, tuple((c.get("field", ""), c.get("message", "")) for c in causes))
    if code == 500 and text.startswith(_MISTYPED):
        return MistypedError(message, tuple(_mistyped_fields(text)))
    if code in (401, 408, 429) or code >= 500:
        return UnavailableError(message, _seconds(details.get("retryAfterSeconds") or retry_after))
    return KubeError(message)


_MISTYPED: Final = "failed to create typed patch object"
"""How server-side apply begins to say that a document is none of its kind, with code 500 (kubernetes#122480)."""
_MISTYPED_FIELD: Final = re.compile(r"^\s*\.(?P<path>(?:\[[^\]]*\]|[^\s:\[\]])+): (?P<problem>.+)$", re.MULTILINE)
_GO_VALUE: Final = re.compile(r"&(?:value\.valueUnstructured\{Value:|\{)(?P<value>.*)\}$")


def _mistyped_fields(text: str) -> Iterator[tuple[str, str]]:
    """Yield path and problem of each field: one behind the document's name, or several, each on a line."""
    _, _, problems = text.partition("): ")
    for found in _MISTYPED_FIELD.finditer(problems):
        yield found["path"], _GO_VALUE.sub(lambda value: value["value"], found["problem"])


_DENIED = re.compile(r'cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"')


def _missing_rule(message: str) -> str:
    """Say which RBAC rule is missing; nothing where it was not RBAC that refused."""
    found = _DENIED.search(message)
    if found is None:
        return ""
    rule = f'{{apiGroups: ["{found["group"]}"], resources: [{found["resource"]}], verbs: [{found["verb"]}]}}'
    return f"; the operator's role lacks the rule {rule}"


def _seconds(value: str | float | None) -> float | None:
    """Read Retry-After; its other form, a date, is not worth a clock."""
    try:
        return None if value is None else max(float(value), 0.0)
    except ValueError:
        return None
