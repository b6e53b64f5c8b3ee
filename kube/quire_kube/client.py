"""`Kube` over HTTP: plain REST with plain JSON, because typed models would cost more memory than all objects together.

Knows paths, media types and answers; no meaning of any object. The official package's transport carries the requests,
`login.py` says by which credentials.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self
from urllib.parse import urlencode

import aiohttp
import msgspec

from quire_contract.names import FIELD_MANAGER
from quire_contract.nesting import bounded_nesting
from quire_kube.api import ConflictError, Kube, KubeError, Manifests, NotFoundError, UnreachableError, error_from
from quire_kube.connection import ConnectionSettingsError
from quire_kube.login import Access, Connect, Login
from quire_kube.objects import Kind, Manifest, Ref

_PAGE_SIZE: Final = 500
_JSON: Final = "application/json"
_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"

OnCall = Callable[[str, str, int], None]
"""Told of each answer: verb, plural of the kind (or the path), HTTP status; 0 where there was none."""


class KubeClient(Kube):
    """An API server over HTTP, from `async with` to its end.

    Args:
        connect: reads the credentials as they are now.
        ref_of: what a manifest that is to be written is called; knows the kinds' plurals.
        on_call: told of each answer.
        timeout_s: for one request, from start to end.
    """

    def __init__(
        self,
        connect: Connect,
        ref_of: Callable[[Manifest], Ref],
        on_call: OnCall,
        timeout_s: float = 30.0,
    ) -> None:
        self._login = Login(connect)
        self._ref_of = ref_of
        self._on_call = on_call
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._login.close()

    async def apply(self, manifest: Manifest) -> Manifest:
        return await self._apply(manifest, None)

    async def apply_status(self, manifest: Manifest) -> Manifest:
        metadata = {
            key: manifest["metadata"][key] for key in ("name", "namespace", "uid") if key in manifest["metadata"]
        }
        head = {key: manifest[key] for key in ("apiVersion", "kind", "status")}
        return await self._apply({**head, "metadata": metadata}, "status")

    async def merge_patch(self, ref: Ref, patch: Mapping[str, Any], *, subresource: str | None = None) -> Manifest:
        query = {"fieldManager": FIELD_MANAGER}
        answer: Manifest = await self._ask("patch", ref, "PATCH", query, patch, _MERGE, subresource)
        return answer

    async def create(self, manifest: Manifest, *, manager: str = FIELD_MANAGER) -> Manifest:
        ref = self._ref_of(manifest)
        request = _Request(
            verb="create",
            plural=ref.kind.plural,
            what=str(ref),
            method="POST",
            path=ref.kind.path(ref.namespace),
            query={"fieldManager": manager},
            body=manifest,
        )
        answer: Manifest = await self._request(request)
        return answer

    async def replace(self, manifest: Manifest, *, manager: str = FIELD_MANAGER) -> Manifest:
        query = {"fieldManager": manager}
        answer: Manifest = await self._ask("update", self._ref_of(manifest), "PUT", query, manifest, _JSON)
        return answer

    async def get(self, ref: Ref) -> Manifest | None:
        try:
            answer: Manifest = await self._ask("get", ref, "GET", {})
        except NotFoundError:
            return None
        return answer

    async def list(
        self,
        kind: Kind,
        namespace: str | None = None,
        label_selector: str | None = None,
        field_selector: str | None = None,
    ) -> Manifests:
        query = {"limit": str(_PAGE_SIZE)}
        if label_selector is not None:
            query["labelSelector"] = label_selector
        if field_selector is not None:
            query["fieldSelector"] = field_selector
        path, what = kind.path(namespace or ""), f"{kind.plural} in {namespace or 'all namespaces'}"
        found: Manifests = []
        while True:
            page = await self._request(_Request(verb="list", plural=kind.plural, what=what, path=path, query=query))
            # Items of a list do not say what they are.
            found += ({"apiVersion": kind.api_version, "kind": kind.kind, **item} for item in page.get("items") or ())
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return found
            query["continue"] = token

    async def delete(self, ref: Ref, uid: str) -> None:
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            await self._ask("delete", ref, "DELETE", {}, options, _JSON)
        except (NotFoundError, ConflictError):
            return  # gone; or what is there now is another incarnation

    async def raw_get(self, path: str) -> Any:
        return await self._request(_Request(verb="get", plural=path, what=path, path=path))

    async def _apply(self, manifest: Manifest, subresource: str | None) -> Manifest:
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        ref = self._ref_of(manifest)
        answer: Manifest = await self._ask("apply", ref, "PATCH", query, manifest, _APPLY, subresource)
        return answer

    async def _ask(
        self,
        verb: str,
        ref: Ref,
        method: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        media_type: str = _JSON,
        subresource: str | None = None,
    ) -> Any:
        request = _Request(
            verb=verb,
            plural=ref.kind.plural,
            what=str(ref),
            method=method,
            path=path_of(ref.kind, ref.namespace, ref.name, subresource),
            query=query,
            body=body,
            media_type=media_type,
        )
        return await self._request(request)

    async def _request(self, request: "_Request") -> Any:
        access = await self._authenticate(request)
        answer = await self._send(request, access)
        if answer.code == 401:
            answer = await self._send(request, await self._authenticate(request, refused=access))
        content = _decode(answer.body)
        if answer.code >= 300:
            status = content if isinstance(content, dict) else {}
            raise error_from(answer.code, status, request.verb, request.what, answer.retry_after)
        if content is None:
            raise KubeError(f"{request.verb} {request.what}: the answer is not JSON")
        return content

    async def _authenticate(self, request: "_Request", refused: Access | None = None) -> Access:
        try:
            return await self._login.access(refused)
        except ConnectionSettingsError as error:
            self._on_call(request.verb, request.plural, 0)
            raise UnreachableError(f"{request.verb} {request.what}: no credentials: {error}") from error

    async def _send(self, request: "_Request", access: Access) -> "_Answer":
        server = access.connection.endpoint.server
        headers = {**access.connection.headers(), "User-Agent": FIELD_MANAGER, "Accept": _JSON}
        headers["Content-Type"] = request.media_type
        try:
            response = await access.transport.request(
                request.method,
                f"{server}{request.path}?{urlencode(request.query)}" if request.query else f"{server}{request.path}",
                headers=headers,
                body=request.body,
                _request_timeout=self._timeout,
            )
            body = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            self._on_call(request.verb, request.plural, 0)
            raise UnreachableError(f"{request.verb} {request.what}: no answer from {server}: {error!r}") from error
        self._on_call(request.verb, request.plural, response.status)
        return _Answer(code=response.status, retry_after=response.headers.get("Retry-After"), body=body)


def path_of(kind: Kind, namespace: str, name: str | None = None, subresource: str | None = None) -> str:
    """Return the path of an object, or, without a name, of all of a kind."""
    return "/".join((kind.path(namespace), *(part for part in (name, subresource) if part is not None)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    verb: str
    plural: str
    what: str
    method: str = "GET"
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    media_type: str = _JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    code: int
    retry_after: str | None
    body: bytes


def _decode(body: bytes) -> Any:
    """Read JSON; None where it is something else, such as a proxy's page."""
    try:
        with bounded_nesting():
            return msgspec.json.decode(body)
    except ValueError:
        return None
