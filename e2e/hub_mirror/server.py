"""A mirror of the Hugging Face Hub for tests: directories served as repositories, with faults on demand.

Speaks what the `huggingface_hub` client and ours ask of a model's repository: its commit and files, the tree, resolve
with a redirect to a "CDN", ranges, entity tags, and the error codes of gated and missing repositories. A file of its
own, needing only starlette and uvicorn, so that a pod can run it from a mounted folder.

    python server.py --config repositories.json [--host 0.0.0.0] [--port 8000]

The configuration is read again whenever it changes:
    {"org/name": {"path": "/directory",           its files; dotfiles are not served
                  "gated_token": "hf_…",          401 without a token, 403 with another
                  "bytes_per_second": 1000000,    of all its connections together
                  "corrupt": ["model.safetensors"],   one byte is wrong; its checksum is announced as it should be
                  "drop_after_bytes": 100000,     each answer breaks off after so many bytes
                  "is_unavailable": true}}        503 for everything
`GET /stats` counts the bytes and the answers of files, by repository. SIGTERM ends it.
"""

import argparse
import asyncio
import hashlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

CHUNK_BYTES = 32 << 10
_LARGE = (".safetensors", ".gguf", ".bin")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """One entry of the configuration."""

    path: Path
    gated_token: str | None = None
    bytes_per_second: float | None = None
    corrupt: tuple[str, ...] = ()
    drop_after_bytes: int | None = None
    is_unavailable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as the Hub describes it. `sha256` is None for what git itself holds."""

    path: Path
    size: int
    git_oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return f'"{self.sha256 or self.git_oid}"'

    @property
    def lfs(self) -> dict[str, Any] | None:
        return (
            {"sha256": self.sha256, "oid": self.sha256, "size": self.size, "pointerSize": 134} if self.sha256 else None
        )


@dataclass(slots=True)
class Traffic:
    """What was served of one repository."""

    num_bytes: int = 0
    num_answers: int = 0
    free_at: float = field(default_factory=time.monotonic)

    async def pass_through(self, num_bytes: int, bytes_per_second: float | None) -> None:
        if bytes_per_second:
            now = time.monotonic()
            self.free_at = max(now, self.free_at) + num_bytes / bytes_per_second
            await asyncio.sleep(self.free_at - now)
        self.num_bytes += num_bytes


class Mirror:
    """The repositories of a configuration file, and what was served of them."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._stamp: tuple[int, int] | None = None
        self._repositories: dict[str, Repository] = {}
        self._files: dict[tuple[Path, int, int], StoredFile] = {}
        self.traffic: dict[str, Traffic] = {}

    def repository(self, request: Request) -> tuple[str, Repository]:
        """Return the repository that a request is for. Raises HTTPException as the Hub answers."""
        self._reload()
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        repository = self._repositories.get(name)
        if repository is None:  # the Hub does not tell a stranger what exists
            status = 404 if "authorization" in request.headers else 401
            raise HTTPException(
                status, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
        if repository.is_unavailable:
            raise HTTPException(503)
        return name, repository

    def _reload(self) -> None:
        status = self._config.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            entries = json.loads(self._config.read_text())
            self._repositories = {
                name: Repository(**{**entry, "path": Path(entry["path"]), "corrupt": tuple(entry.get("corrupt", ()))})
                for name, entry in entries.items()
            }
            self._stamp = stamp

    def files(self, repository: Repository) -> dict[str, StoredFile]:
        paths = {path.relative_to(repository.path): path for path in sorted(repository.path.rglob("*"))}
        return {
            name.as_posix(): self._file(path)
            for name, path in paths.items()
            if path.is_file() and not any(part.startswith(".") for part in name.parts)
        }

    def _file(self, path: Path) -> StoredFile:
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size)
        if key not in self._files:
            git, sha256 = hashlib.sha1(f"blob {status.st_size}\0".encode()), hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    git.update(chunk)
                    sha256.update(chunk)
            large = sha256.hexdigest() if path.suffix in _LARGE else None
            self._files[key] = StoredFile(path=path, size=status.st_size, git_oid=git.hexdigest(), sha256=large)
        return self._files[key]

    def commit(self, files: dict[str, StoredFile]) -> str:
        return hashlib.sha1(repr([(name, file.git_oid) for name, file in files.items()]).encode()).hexdigest()

    def at_revision(self, request: Request) -> tuple[str, Repository, dict[str, StoredFile], str]:
        name, repository = self.repository(request)
        files = self.files(repository)
        commit = self.commit(files)
        if request.path_params.get("revision", "main") not in ("main", commit):
            raise HTTPException(404, headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        return name, repository, files, commit


def _check_token(request: Request, repository: Repository) -> None:
    """A gated repository shows its list of files to everybody, and its files to those who may read them."""
    if repository.gated_token is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if given != repository.gated_token:
        message = "Access to this model is restricted."
        headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
        raise HTTPException(403 if given else 401, headers=headers)


def _entry(name: str, file: StoredFile) -> dict[str, Any]:
    entry = {"type": "file", "oid": file.git_oid, "size": file.size, "path": name}
    return entry | ({"lfs": file.lfs} if file.lfs else {})


class Endpoints:
    """What the Hub answers."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    async def model_info(self, request: Request) -> Response:
        name, repository, files, commit = self._mirror.at_revision(request)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in files]
        if request.query_params.get("blobs"):
            for sibling, file in zip(siblings, files.values(), strict=True):
                sibling |= {"size": file.size, "blobId": file.git_oid} | ({"lfs": file.lfs} if file.lfs else {})
        gated = "auto" if repository.gated_token else False
        return JSONResponse({"id": name, "modelId": name, "sha": commit, "gated": gated, "siblings": siblings})

    async def tree(self, request: Request) -> Response:
        _, _, files, _ = self._mirror.at_revision(request)
        return JSONResponse([_entry(name, file) for name, file in files.items()])

    async def resolve(self, request: Request) -> Response:
        name, repository, files, commit = self._mirror.at_revision(request)
        _check_token(request, repository)
        path = request.path_params["path"]
        if path not in files:
            raise HTTPException(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        file = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": file.etag}
        if file.sha256 is None:
            return await self._send(request, name, repository, path, file, headers)
        headers |= {"X-Linked-ETag": file.etag, "X-Linked-Size": str(file.size)}
        location = f"{request.url.scheme}://{request.url.netloc}/cdn/{name}/{file.sha256}/{path}"
        return Response(status_code=302, headers=headers | {"Location": location})

    async def cdn(self, request: Request) -> Response:
        name, repository, files, commit = self._mirror.at_revision(request)
        path = request.path_params["path"]
        file = files.get(path)
        if file is None or file.sha256 != request.path_params["sha256"]:
            raise HTTPException(404)
        # The Hub's CDN is another host and does not name the commit; the library follows redirects to this one.
        headers = {"X-Repo-Commit": commit, "ETag": file.etag}
        return await self._send(request, name, repository, path, file, headers)

    async def _send(
        self, request: Request, name: str, repository: Repository, path: str, file: StoredFile, headers: dict[str, str]
    ) -> Response:
        start, end, status = 0, file.size, 200
        wanted = _RANGE.fullmatch(request.headers.get("range", ""))
        if wanted and request.headers.get("if-range", file.etag) == file.etag:
            start, end, status = int(wanted[1]), min(file.size, int(wanted[2] or file.size) + 1), 206
            if start >= file.size:
                raise HTTPException(416, headers={"Content-Range": f"bytes */{file.size}"})
            headers |= {"Content-Range": f"bytes {start}-{end - 1}/{file.size}"}
        headers |= {"Content-Length": str(end - start), "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        traffic = self._mirror.traffic.setdefault(name, Traffic())
        traffic.num_answers += 1
        body = _read(repository, path, file, start, end, traffic)
        return StreamingResponse(body, status, headers, media_type="application/octet-stream")

    async def stats(self, request: Request) -> Response:
        traffic = self._mirror.traffic.items()
        return JSONResponse({name: {"bytes": of.num_bytes, "answers": of.num_answers} for name, of in traffic})

    async def healthz(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")


def build_app(config: Path) -> Starlette:
    """Build the mirror of one configuration file."""
    endpoints = Endpoints(Mirror(config))
    repository, api = "{owner}/{name}", "/api/models/{owner}/{name}"
    return Starlette(
        routes=[
            Route("/stats", endpoints.stats),
            Route("/healthz", endpoints.healthz),
            Route(api, endpoints.model_info),
            Route(f"{api}/revision/{{revision:path}}", endpoints.model_info),
            Route(f"{api}/tree/{{revision}}", endpoints.tree),
            Route(f"/{repository}/resolve/{{revision}}/{{path:path}}", endpoints.resolve, methods=["GET", "HEAD"]),
            Route(f"/cdn/{repository}/{{sha256}}/{{path:path}}", endpoints.cdn, methods=["GET", "HEAD"]),
        ]
    )


async def _read(
    repository: Repository, path: str, file: StoredFile, start: int, end: int, traffic: Traffic
) -> AsyncIterator[bytes]:
    """Yield a range of a file, with the faults that the configuration asks for."""
    bad_byte = file.size // 2 if path in repository.corrupt else None
    sent = 0
    with file.path.open("rb") as stored:
        stored.seek(start)
        while (position := stored.tell()) < end:
            chunk = bytearray(stored.read(min(CHUNK_BYTES, end - position)))
            if bad_byte is not None and position <= bad_byte < position + len(chunk):
                chunk[bad_byte - position] ^= 0xFF
            await traffic.pass_through(len(chunk), repository.bytes_per_second)
            yield bytes(chunk)
            sent += len(chunk)
            if repository.drop_after_bytes is not None and sent >= repository.drop_after_bytes:
                return  # short of the announced length: uvicorn closes the connection


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one; the first line of output names it")
    arguments = parser.parse_args()
    listener = socket.create_server((arguments.host, arguments.port))
    print(f"http://{arguments.host}:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(build_app(arguments.config), log_level="critical", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
