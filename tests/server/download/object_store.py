"""A server of objects for tests: S3's and Google's list, head and get, and plain URLs. Counts what it sends."""

import base64
import hashlib
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class ObjectStore:
    """Objects by `bucket/key`, and how they are served."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        """Further headers of each answer with an object."""
        self.wrong: set[str] = set()
        """Objects that are sent with one byte changed."""
        self.secret: str | None = None
        """What the Authorization header must hold."""
        self.has_ranges = True
        self.has_tags = True
        self.break_after: int | None = None
        """Bytes after which an answer breaks off, once."""
        self.num_bytes = 0
        self.ranges: list[str] = []
        self.url = ""

    def tag(self, name: str) -> str:
        return hashlib.md5(self.objects[name]).hexdigest()


@contextmanager
def running_store(tls: ssl.SSLContext | None = None) -> Iterator[ObjectStore]:
    store = ObjectStore()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(store))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}"
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


def _handler(store: ObjectStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            path = unquote(url.path).strip("/")
            if store.secret is not None and store.secret not in self.headers.get("Authorization", ""):
                self._refuse(403, "AccessDenied")
            elif match := re.fullmatch(r"(?:download/)?storage/v1/b/([^/]+)/o(?:/(.*))?", path):
                self._google(match[1], match[2], query)
            elif "list-type" in query:
                self._list(path, query.get("prefix", ""))
            elif path in store.objects:
                self._send_object(path)
            else:
                self._refuse(404, "NoSuchBucket" if "/" not in path else "NoSuchKey")

        def _list(self, bucket: str, prefix: str) -> None:
            if not any(name.startswith(f"{bucket}/") for name in store.objects):
                return self._refuse(404, "NoSuchBucket")
            names = [n for n in sorted(store.objects) if n.startswith(f"{bucket}/{prefix}")]
            contents = "".join(
                f"<Contents><Key>{escape(name.partition('/')[2])}</Key><Size>{len(store.objects[name])}</Size>"
                f"<ETag>&quot;{store.tag(name)}&quot;</ETag><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
                for name in names
            )
            body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
            return self._answer(200, body.encode(), {"Content-Type": "application/xml"})

        def _google(self, bucket: str, key: str | None, query: dict[str, str]) -> None:
            if key is not None and f"{bucket}/{key}" not in store.objects:
                return self._refuse(404, "notFound")
            if query.get("alt") == "media":
                return self._send_object(f"{bucket}/{key}")
            if key is not None:
                return self._json(self._resource(bucket, key))
            if not any(name.startswith(f"{bucket}/") for name in store.objects):
                return self._refuse(404, "notFound")
            keys = [name.partition("/")[2] for name in store.objects if name.startswith(f"{bucket}/")]
            items = [self._resource(bucket, k) for k in keys if k.startswith(query.get("prefix", ""))]
            return self._json({"kind": "storage#objects", "items": items})

        def _resource(self, bucket: str, key: str) -> dict[str, Any]:
            content = store.objects[f"{bucket}/{key}"]
            return {
                "kind": "storage#object", "name": key, "bucket": bucket, "size": str(len(content)), "generation": "7",
                "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(), "etag": "x",
                "updated": "2026-01-01T00:00:00Z", "timeCreated": "2026-01-01T00:00:00Z",
            }  # fmt: skip

        def _json(self, value: object) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send_object(self, name: str) -> None:
            content = bytearray(store.objects[name])
            if name in store.wrong:
                content[len(content) // 2] ^= 0xFF
            headers = {"Content-Type": "application/octet-stream", **store.headers}
            if store.has_tags:
                headers["ETag"] = f'"{store.tag(name)}"'
            status, start, end = 200, 0, len(content)
            wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
            is_same = self.headers.get("If-Range", headers.get("ETag")) == headers.get("ETag")
            if wanted and store.has_ranges and is_same:
                store.ranges.append(wanted[0])
                status, start, end = 206, int(wanted[1]), min(len(content), int(wanted[2] or len(content)) + 1)
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            self._answer(status, bytes(content[start:end]), headers)

        def _refuse(self, status: int, code: str) -> None:
            body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            self._answer(status, body, {"Content-Type": "application/xml"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if store.break_after is not None and len(body) > store.break_after:
                body, store.break_after = body[: store.break_after], None
                self.close_connection = True
            self.wfile.write(body)
            store.num_bytes += len(body) if status < 300 else 0

    return Handler
