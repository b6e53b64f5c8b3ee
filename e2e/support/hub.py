"""The hub mirror on this machine: which models it has, its faults, and what it has served."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GATED_TOKEN = "hf_a-token-that-opens-it"
MIRROR = Path(__file__).resolve().parents[1] / "hub_mirror" / "server.py"


class Hub:
    """A mirror process. `url` is how pods reach it."""

    def __init__(self, folder: Path, address: str, models: dict[str, Path]) -> None:
        self._config = folder / "repositories.json"
        self._write({name: {"path": str(path)} for name, path in models.items()})
        words = [sys.executable, str(MIRROR), "--config", str(self._config), "--host", "0.0.0.0", "--port", "0"]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip().rpartition(":")[2]
        self.url = f"http://{address}:{port}"
        self._local_url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=10)

    def size_of(self, name: str) -> int:
        """Bytes of a model's files."""
        return sum(path.stat().st_size for path in Path(self._read()[name]["path"]).rglob("*") if path.is_file())

    def served_bytes(self, name: str) -> int:
        with urllib.request.urlopen(f"{self._local_url}/stats", timeout=10) as response:
            return int(json.load(response).get(name, {}).get("bytes", 0))

    def gate(self, name: str, token: str) -> None:
        """Give a model's files only to who has the token."""
        entries = self._read()
        entries[name]["gated_token"] = token
        self._write(entries)

    @contextmanager
    def changed(self, name: str, **faults: Any) -> Iterator[None]:
        """Let a model be slow, corrupt or gated for a while."""
        before = self._read()
        self._write({**before, name: {**before[name], **faults}})
        try:
            yield
        finally:
            self._write(before)

    @contextmanager
    def published(self, name: str, *, like: str) -> Iterator[None]:
        """Let there be a model for a while."""
        before = self._read()
        self._write({**before, name: before[like]})
        try:
            yield
        finally:
            self._write(before)

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._config.read_text())
        return found

    def _write(self, entries: dict[str, Any]) -> None:
        unfinished = self._config.with_suffix(".new")
        unfinished.write_text(json.dumps(entries))
        unfinished.rename(self._config)
