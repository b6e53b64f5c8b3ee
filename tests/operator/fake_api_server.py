"""An API server over HTTP, as much of one as kopf and the operator's client speak with: discovery, list, watch, writes.

Applying replaces the fields that a document names, no more. Every write is kept in `writes`.
"""

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from quire_kube.objects import Kind
from quire_operator.spec.kinds import EVENT, LEASE, OPTIONAL_KINDS, STORAGE_CLASS
from quire_operator.watch.kopf_watch.handlers import WATCHED_KINDS

Manifest = dict[str, Any]
CORE_KINDS = (*(kind for kind in WATCHED_KINDS if kind not in OPTIONAL_KINDS), EVENT, LEASE, STORAGE_CLASS)
KOPF_KINDS = (  # which kopf wants to know of, though it watches neither
    Kind(api_version="v1", kind="Namespace", plural="namespaces", is_namespaced=False),
    Kind(
        api_version="apiextensions.k8s.io/v1",
        kind="CustomResourceDefinition",
        plural="customresourcedefinitions",
        is_namespaced=False,
    ),
)
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class FakeApiServer:
    """All objects by path; change them through the methods."""

    def __init__(self, kinds: Iterable[Kind] = CORE_KINDS) -> None:
        self.kinds = {*kinds, *KOPF_KINDS}
        self.objects: dict[str, Manifest] = {}
        self.writes: list[tuple[str, str]] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.page_delay_s = 0.0
        self.is_failing = False
        self.token: str | None = None
        """The only one that is not answered with 401; None: any."""
        self.gone_paths: set[str] = set()
        """Answered with 404."""
        self.url = ""
        self._version = 100
        self._watches: set[tuple[str, str, asyncio.Queue[Manifest]]] = set()

    def put(self, manifest: Manifest) -> Manifest:
        """Create or change an object; watches tell."""
        path = self._path(manifest)
        old = self.objects.get(path)
        self._version += 1
        metadata = {"uid": f"uid-{self._version}", "creationTimestamp": "2026-01-01T00:00:00Z"}
        metadata |= (old or {}).get("metadata", {}) | manifest["metadata"] | {"resourceVersion": str(self._version)}
        new = {**copy.deepcopy(manifest), "metadata": metadata}
        self.objects[path] = new
        self._tell(old, new)
        return new

    def delete(self, manifest: Manifest, *, is_told: bool = True) -> None:
        """Delete an object; untold, as if it went while a watch was broken."""
        old = self.objects.pop(self._path(manifest))
        self._version += 1
        if is_told:
            self._tell({**old, "metadata": old["metadata"] | {"resourceVersion": str(self._version)}}, None)

    def expire_watches(self) -> None:
        """End all watches with 410 Gone."""
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410}
        for _, _, queue in self._watches:
            queue.put_nowait({"type": "ERROR", "object": status})

    def bookmark(self) -> None:
        metadata = {"resourceVersion": str(self._version)}
        for _, _, queue in self._watches:
            queue.put_nowait({"type": "BOOKMARK", "object": {"kind": "", "apiVersion": "", "metadata": metadata}})

    @property
    def num_watches(self) -> int:
        return len(self._watches)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve; yields the URL."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self.url
        finally:
            await runner.cleanup()

    def write_kubeconfig(self, path: Path, user: Manifest | None = None) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": user or {"token": "none"}}],
        }
        path.write_text(json.dumps(config))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path, dict(request.query)))
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _failure(401, "Unauthorized")
        if self.is_failing:
            return web.json_response({"kind": "Status", "code": 500, "message": "failing"}, status=500)
        if request.path in self.gone_paths:
            return _failure(404, "NotFound")
        if request.method != "GET":
            return await self._write(request)
        if request.path in self.objects:
            return web.json_response(self.objects[request.path])
        found = self._discovery(request.path)
        if found is not None:
            return web.json_response(found)
        kind = self._kind_of(request.path)
        if kind is None:
            return _failure(404, "NotFound")
        if request.query.get("watch") == "true":
            return await self._watch(request)
        return await self._list(request, kind)

    def _discovery(self, path: str) -> Manifest | None:
        if path == "/version":
            return {"major": "1", "minor": "34"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        groups = {kind.group: kind.api_version for kind in self.kinds if kind.group}
        if path == "/apis":
            versions = {g: {"groupVersion": v, "version": v.partition("/")[2]} for g, v in groups.items()}
            listed = [{"name": g, "versions": [v], "preferredVersion": v} for g, v in versions.items()]
            return {"kind": "APIGroupList", "groups": listed}
        served = [kind for kind in self.kinds if path == _root(kind)]
        if not served:
            return None
        resources = [
            {
                "name": kind.plural,
                "singularName": kind.kind.lower(),
                "kind": kind.kind,
                "namespaced": kind.is_namespaced,
                "verbs": VERBS,
            }
            for kind in served
        ]
        return {"kind": "APIResourceList", "groupVersion": served[0].api_version, "resources": resources}

    async def _list(self, request: web.Request, kind: Kind) -> web.Response:
        selector = request.query.get("labelSelector", "")
        found = [o for path, o in sorted(self.objects.items()) if _is_in(path, request.path) and _matches(o, selector)]
        first = int(request.query.get("continue") or 0)
        limit = int(request.query.get("limit") or len(found) or 1)
        metadata = {"resourceVersion": str(self._version)}
        if first + limit < len(found):
            metadata["continue"] = str(first + limit)
        page = {
            "kind": f"{kind.kind}List",
            "apiVersion": kind.api_version,
            "metadata": metadata,
            "items": [
                {k: v for k, v in o.items() if k not in ("kind", "apiVersion")} for o in found[first : first + limit]
            ],
        }
        body = json.dumps(page)
        await asyncio.sleep(self.page_delay_s)
        return web.Response(text=body, content_type="application/json")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        queue: asyncio.Queue[Manifest] = asyncio.Queue()
        watch = (request.path, request.query.get("labelSelector", ""), queue)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        self._watches.add(watch)
        try:
            await response.prepare(request)
            await response.write(b"\n")  # the headers wait for a body
            while True:
                event = await queue.get()
                await response.write(json.dumps(event).encode() + b"\n")
                if event["type"] == "ERROR":
                    return response
        finally:
            self._watches.discard(watch)

    async def _write(self, request: web.Request) -> web.Response:
        body = await request.json()
        path = request.path.removesuffix("/status")
        is_lease = f"/{LEASE.plural}" in path
        if not is_lease:
            self.writes.append((request.method, request.path))
        old = self.objects.get(path)
        if request.method == "DELETE":
            if old is None:
                return _failure(404, "NotFound")
            self.delete(old)
            return web.json_response({"kind": "Status", "status": "Success"})
        if request.method == "POST":
            if "name" not in body["metadata"]:
                body["metadata"]["name"] = f"{body['metadata']['generateName']}{self._version}"
            if f"{path}/{body['metadata']['name']}" in self.objects:
                return _failure(409, "AlreadyExists")
            return web.json_response(self.put(body), status=201)
        if request.method == "PUT" and old is None:
            return _failure(404, "NotFound")
        if request.method == "PUT" and body["metadata"].get("resourceVersion") != old["metadata"]["resourceVersion"]:
            return _failure(409, "Conflict")
        return web.json_response(self.put(body if request.method == "PUT" else _merge(old or {}, body)))

    def _tell(self, old: Manifest | None, new: Manifest | None) -> None:
        path = self._path(new or old or {})
        for where, selector, queue in self._watches:
            if not _is_in(path, where):
                continue
            was, is_now = old is not None and _matches(old, selector), new is not None and _matches(new, selector)
            if was or is_now:
                kind = "MODIFIED" if was and is_now else "ADDED" if is_now else "DELETED"
                gone = {**(old or {}), "metadata": (new or old or {})["metadata"]}
                queue.put_nowait({"type": kind, "object": new if is_now else gone})

    def _path(self, manifest: Manifest) -> str:
        kind = next(k for k in self.kinds if (k.api_version, k.kind) == (manifest["apiVersion"], manifest["kind"]))
        namespace = manifest["metadata"].get("namespace")
        where = f"{_root(kind)}/namespaces/{namespace}" if namespace else _root(kind)
        return f"{where}/{kind.plural}/{manifest['metadata']['name']}"

    def _kind_of(self, path: str) -> Kind | None:
        """Return the kind of a collection, of one namespace or of all."""
        where, _, plural = path.rpartition("/")
        return next((k for k in self.kinds if k.plural == plural and _is_of(where, k)), None)


def _root(kind: Kind) -> str:
    return f"/apis/{kind.api_version}" if kind.group else f"/api/{kind.api_version}"


def _is_of(where: str, kind: Kind) -> bool:
    rest = where.removeprefix(_root(kind))
    return rest == "" or (rest.startswith("/namespaces/") and rest.count("/") == 2 and kind.is_namespaced)


def _is_in(path: str, collection: str) -> bool:
    """Whether an object's path is in a collection, of one namespace or of all."""
    where, _, plural = collection.rpartition("/")
    return path.startswith(where + "/") and path.split("/")[-2] == plural


def _matches(manifest: Manifest, selector: str) -> bool:
    labels = manifest["metadata"].get("labels") or {}
    return all(labels.get(k) == v for k, _, v in (term.partition("=") for term in selector.split(",") if term))


def _merge(old: Manifest, new: Manifest) -> Manifest:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if both else value
    return merged


def _failure(code: int, reason: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "code": code, "reason": reason}, status=code)
