"""A real `quire up` process on a manifest of tiny models."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Up:
    """`quire up -f FILE` on a free port, with its output collected line by line."""

    def __init__(self, file: Path, home: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "quire_cli", "up", "-f", str(file), "--port", "0", "--cache-dir", str(home)]
        self.process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ}
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for(r"gateway: (http://\S+)/v1").group(1)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for a line that matches, among those from index `after` on."""

        def find() -> re.Match[str] | None:
            return next((m for line in self.lines[after:] if (m := re.search(pattern, line))), None)

        with self._changed:
            self._changed.wait_for(lambda: find() is not None or self.process.poll() is not None, timeout=60)
            found = find()
        assert found is not None, f"no line matches {pattern!r}:\n" + "\n".join(self.lines)
        return found

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        return code


@pytest.fixture(scope="session")
def start_up(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    @contextmanager
    def start(file: Path, *flags: str) -> Iterator[Up]:
        up = Up(file, tmp_path_factory.mktemp("home"), *flags)
        try:
            yield up
        finally:
            if up.process.poll() is None:
                up.interrupt()
            assert up.process.stdout is not None
            up.process.stdout.close()

    return start
