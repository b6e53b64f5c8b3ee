"""`Kube` over HTTP: plain REST with plain JSON, because typed models would cost more memory than all objects together.

Knows paths, media types and credentials; no meaning of any object. Credentials are asked for anew every few minutes,
since the tokens of service accounts rotate, and at once when they are refused.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self

import aiohttp
import msgspec

from quire_contract.names import FIELD_MANAGER
from quire_contract.nesting import bounded_nesting
from quire_operator.kube import ConflictError, Kube, KubeError, Manifests, NotFoundError, UnreachableError, error_from
from quire_operator.objects import Kind, Manifest, Ref, ref_of

_CREDENTIALS_LAST_S: Final = 300.0
_PAGE_SIZE: Final = 500
_MAX_CONNECTIONS: Final = 32
_JSON: Final = "application/json"
_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"

OnCall = Callable[[str, str, int], None]
"""Told of each answer: verb, plural of the kind (or the path), HTTP status; 0 where there was none."""


class Connection(Protocol):
    """How to reach the API server and who we are; `kopf.ConnectionInfo` is one."""

    @property
    def server(self) -> str: ...

    @property
    def proxy_url(self) -> str | None: ...

    def as_ssl_context(self) -> ssl.SSLContext: ...

    def as_http_headers(self) -> Mapping[str, str]: ...


class KubeClient(Kube):
    """An API server over HTTP, from `async with` to its end.

    Args:
        connect: reads the credentials as they are now; may block.
        on_call: told of each answer.
        timeout_s: for one request, from start to end.
    """

    def __init__(self, connect: Callable[[], Connection], on_call: OnCall, timeout_s: float = 30.0) -> None:
        self._connect = connect
        self._on_call = on_call
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._access: _Access | None = None
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=_MAX_CONNECTIONS)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

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
        ref = ref_of(manifest)
        request = _Request(
            verb="create",
            plural=ref.kind.plural,
            what=str(ref),
            method="POST",
            path=path_of(ref.kind, ref.namespace),
            query={"fieldManager": manager},
            body=manifest,
        )
        answer: Manifest = await self._request(request)
        return answer

    async def replace(self, manifest: Manifest, *, manager: str = FIELD_MANAGER) -> Manifest:
        query = {"fieldManager": manager}
        answer: Manifest = await self._ask("update", ref_of(manifest), "PUT", query, manifest, _JSON)
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
        path, what = path_of(kind, namespace or ""), f"{kind.plural} in {namespace or 'all namespaces'}"
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
        answer: Manifest = await self._ask("apply", ref_of(manifest), "PATCH", query, manifest, _APPLY, subresource)
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
        answer = await self._send(request, await self._authenticate())
        if answer.code == 401:
            answer = await self._send(request, await self._authenticate(is_refused=True))
        content = _decode(answer.body)
        if answer.code >= 300:
            status = content if isinstance(content, dict) else {}
            raise error_from(answer.code, status, request.verb, request.what, answer.retry_after)
        if content is None:
            raise KubeError(f"{request.verb} {request.what}: the answer is not JSON")
        return content

    async def _send(self, request: "_Request", access: "_Access") -> "_Answer":
        assert self._session is not None, "not entered"
        headers = {**access.connection.as_http_headers(), "User-Agent": FIELD_MANAGER, "Accept": _JSON}
        data = None
        if request.body is not None:
            data, headers["Content-Type"] = msgspec.json.encode(request.body), request.media_type
        sending = self._session.request(
            request.method,
            access.connection.server.rstrip("/") + request.path,
            params=request.query,
            data=data,
            headers=headers,
            proxy=access.connection.proxy_url,
            ssl=access.ssl_context,
        )
        try:
            async with sending as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            self._on_call(request.verb, request.plural, 0)
            where = access.connection.server
            raise UnreachableError(f"{request.verb} {request.what}: no answer from {where}: {error!r}") from error
        self._on_call(request.verb, request.plural, response.status)
        return _Answer(code=response.status, retry_after=response.headers.get("Retry-After"), body=body)

    async def _authenticate(self, *, is_refused: bool = False) -> "_Access":
        """Return credentials that are at most a few minutes old, or wholly new ones."""
        async with self._connecting:
            access = self._access
            if access is None or is_refused or time.monotonic() - access.since > _CREDENTIALS_LAST_S:
                connection = await asyncio.to_thread(self._connect)
                is_same = access is not None and connection == access.connection
                ssl_context = access.ssl_context if access and is_same else connection.as_ssl_context()
                access = _Access(connection=connection, ssl_context=ssl_context, since=time.monotonic())
                self._access = access
            return access


def path_of(kind: Kind, namespace: str, name: str | None = None, subresource: str | None = None) -> str:
    """Return the path of an object, or, without a name, of all of a kind."""
    root = f"/apis/{kind.api_version}" if kind.group else f"/api/{kind.api_version}"
    parts = [root]
    if namespace and kind.is_namespaced:
        parts += ["namespaces", namespace]
    return "/".join((*parts, kind.plural, *(part for part in (name, subresource) if part is not None)))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Access:
    connection: Connection
    ssl_context: ssl.SSLContext
    since: float


def _decode(body: bytes) -> Any:
    """Read JSON; None where it is something else, such as a proxy's page."""
    try:
        with bounded_nesting():
            return msgspec.json.decode(body)
    except ValueError:
        return None
