import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from quire_contract.model_facts import DownloadProgress, ModelFacts, decode_facts
from quire_contract.termination import TerminationMessage, decode_termination

MIRROR = Path(__file__).parents[3] / "e2e" / "hub_mirror" / "server.py"
REPOSITORY = "org/tiny"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 128, "vocab_size": 259,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}  # fmt: skip
DEADLINE_S = 60.0


def safetensors_bytes(size: int, seed: int = 0) -> bytes:
    """Return a safetensors file with one tensor of random bytes."""
    import random

    header = json.dumps({f"t{seed}": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(size)


def write_model(directory: Path, num_files: int = 2, size: int = 300_000) -> Path:
    """Write a model of several safetensors files, and files that nobody needs."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}" * 500)
    (directory / "README.md").write_text("# Hello")
    (directory / "pytorch_model.bin").write_bytes(b"x" * 1000)
    weight_map = {}
    for i in range(num_files):
        name = f"model-{i}.safetensors"
        (directory / name).write_bytes(safetensors_bytes(size, i))
        weight_map[f"t{i}"] = name
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def needed_bytes(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.iterdir() if f.suffix in (".json", ".safetensors", ".gguf"))


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")


class RunningMirror:
    """A mirror process, and the configuration that it reads."""

    def __init__(self, folder: Path) -> None:
        self._config = folder / "repositories.json"
        self._entries: dict[str, dict[str, Any]] = {}
        self._config.write_text("{}")
        command = [sys.executable, str(MIRROR), "--config", str(self._config), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def serve(self, name: str, path: Path, **options: Any) -> None:
        self._entries[name] = {"path": str(path), **options}
        draft = self._config.with_suffix(".draft")
        draft.write_text(json.dumps(self._entries))
        draft.replace(self._config)

    def bytes_served(self, name: str = REPOSITORY) -> int:
        with urllib.request.urlopen(f"{self.url}/stats", timeout=10) as answer:
            return int(json.load(answer).get(name, {}).get("bytes", 0))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[RunningMirror]:
    folder = tmp_path / "mirror"
    folder.mkdir()
    running = RunningMirror(folder)
    yield running
    running.stop()


class Job:
    """A `quire download` process, as the Job's pod runs it: a home that cannot be written to, and a termination log."""

    def __init__(self, words: list[str], volume: Path, folder: Path, environment: dict[str, str]) -> None:
        self._termination = folder / f"termination-{time.monotonic_ns()}"
        self._log = folder / f"log-{time.monotonic_ns()}"
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "AWS_", "QUIRE_"))}
        variables |= {"HOME": "/proc", "QUIRE_TERMINATION_LOG": str(self._termination), **environment}
        command = [sys.executable, "-m", "quire_cli", "download", *words, "--directory", str(volume)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--progress-port", "0"], stdout=subprocess.DEVNULL, stderr=log, env=variables
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def facts(self) -> ModelFacts:
        assert self.wait() == 0, self.log
        facts = decode_facts(self._termination.read_bytes())
        assert facts is not None
        assert self._termination.stat().st_size <= 4096
        return facts

    def failure(self) -> TerminationMessage:
        assert self.wait() == 1, self.log
        message = decode_termination(self._termination.read_bytes())
        assert message is not None
        assert message.stage == "Downloading"
        return message

    def end(self) -> TerminationMessage | None:
        return decode_termination(self._termination.read_bytes()) if self._termination.exists() else None

    def progress(self) -> DownloadProgress | None:
        """What the progress server says; None while it is not there."""
        import msgspec

        _, found, rest = self.log.partition("Progress at ")
        if not found or "\n" not in rest:
            return None
        with suppress(OSError), urllib.request.urlopen(rest.partition("\n")[0], timeout=10) as answer:
            return msgspec.json.decode(answer.read(), type=DownloadProgress)
        return None

    def pause(self) -> None:
        """Stop it where it is, so that it does not end while something is tried."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.go_on()
        self.process.wait(10)


StartJob = Callable[..., Job]


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return tmp_path / "volume"


@pytest.fixture
def start_job(tmp_path: Path, volume: Path, mirror: RunningMirror) -> Iterator[StartJob]:
    jobs: list[Job] = []

    def start(*words: str, **environment: str) -> Job:
        job = Job(list(words), volume, tmp_path, {"HF_ENDPOINT": mirror.url, **environment})
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.kill()


@pytest.fixture
def support() -> Any:
    """This file's helpers: test folders are no packages."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def running_store() -> Any:
    """Runs a server of objects; see `object_store.py`."""
    location = Path(__file__).with_name("object_store.py")
    specification = importlib.util.spec_from_file_location("object_store", location)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.running_store


@pytest.fixture
def store(running_store) -> Iterator[Any]:
    """A server of objects."""
    with running_store() as running:
        yield running
