import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from quire_contract.model_uri import parse_model_uri
from quire_contract.paths import COMPLETE_MARKER
from quire_contract.phases import Phase, Readiness
from quire_server.download.errors import (
    DownloadError,
    ModelGatedError,
    NoSpaceError,
    SourceNotFoundError,
    SourceUnreachableError,
)
from quire_server.download.model_source import ModelSource, fetch_model, parse_model_source, resolve_model
from quire_server.shared.errors import ConfigError

FILES = {"config.json": 100, "tokenizer.json": 400, "model.safetensors": 1500}


class FakeHub:
    """Stands in for `snapshot_download`: knows files, counts bytes, or fails."""

    def __init__(self, directory: Path, files: dict[str, int]) -> None:
        self.directory = directory
        self.files = files
        self.error: Exception | None = None
        self.is_offline = False
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, **options: Any) -> Any:
        self.calls.append(options)
        names = list(
            huggingface_hub.utils.filter_repo_objects(
                self.files, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
            )
        )
        if options.get("dry_run"):
            if self.is_offline or self.error is not None:
                raise hub_errors.DryRunError("not reachable") from self.error
            return [SimpleNamespace(filename=name, file_size=self.files[name], will_download=True) for name in names]
        if self.error is not None:
            raise self.error
        target = Path(options.get("local_dir") or self.directory)
        target.mkdir(parents=True, exist_ok=True)
        for kind in ("received", "written"):
            bar = options["tqdm_class"](total=0, unit="B", unit_scale=True, desc=kind, name="x")
            for name in names:
                bar.total = (bar.total or 0) + self.files[name]
                bar.update(self.files[name])
                (target / name).touch()
            bar.close()
        counter = options["tqdm_class"](total=len(names), desc="files")
        counter.update(1)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshot", dict(FILES))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def http_error(kind: type[hub_errors.HfHubHTTPError]) -> hub_errors.HfHubHTTPError:
    import httpx2

    request = httpx2.Request("GET", "https://hub")
    return kind("no", response=httpx2.Response(401, request=request))


REMOTE = ModelSource(repo_id="org/name", revision="v1")


def test_what_a_model_may_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "m.gguf").touch()
    assert parse_model_source(str(tmp_path)).path == tmp_path
    assert parse_model_source(f"file://{tmp_path}/m.gguf").path == tmp_path / "m.gguf"
    remote = parse_model_source("hf://org/name", revision="v2", token="t")
    assert (remote.repo_id, remote.revision, remote.token, remote.path) == ("org/name", "v2", "t", None)
    assert parse_model_source("org/name").repo_id == "org/name"
    monkeypatch.chdir(tmp_path)
    assert parse_model_source("org/name").path == Path("org/name")  # what is there wins
    assert parse_model_source("file://m.gguf").path == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("/nowhere", "neither an existing file"),
        ("nowhere", "neither an existing file"),
        ("org/model.gguf", "neither an existing file"),
        ("file:///nowhere", "neither an existing file"),
        ("s3://bucket/x", "fetched into a directory first"),
        ("ftp://host/x", "not a model URI"),
        ("hf://a/b/c", "name one GGUF file"),
    ],
)
def test_what_no_model_is_called(model: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_model_source(model)


def test_a_local_model_is_where_it_is(tmp_path: Path) -> None:
    reports: list[Readiness] = []
    assert resolve_model(ModelSource(path=tmp_path), reports.append) == tmp_path
    assert reports == []


def test_only_needed_files_are_fetched_and_progress_is_told(hub: FakeHub) -> None:
    hub.files |= {"original/model.safetensors": 7, "consolidated.safetensors": 7, "pytorch_model.bin": 7, "a.png": 7}
    reports: list[Readiness] = []
    path = resolve_model(REMOTE, reports.append)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert {report.phase for report in reports} == {Phase.DOWNLOADING}
    percents = [report.percent for report in reports if report.percent is not None]
    assert percents == [5.0, 25.0, 100.0]
    assert "2.0 KiB" in reports[-1].message
    assert all(call["revision"] == "v1" and call["repo_id"] == "org/name" for call in hub.calls)


def test_a_repository_of_one_gguf_file(hub: FakeHub) -> None:
    hub.files = {"m.gguf": 10, "README.md": 1, "config.json": 1}
    assert resolve_model(REMOTE, lambda _: None) == hub.directory / "m.gguf"


@pytest.mark.parametrize(
    ("files", "match"),
    [({"a.gguf": 1, "b.gguf": 1}, "several GGUF models .*a.gguf, b.gguf"), ({"x.bin": 1}, "holds no")],
)
def test_a_repository_without_one_model(hub: FakeHub, files: dict[str, int], match: str) -> None:
    hub.files = files
    with pytest.raises(DownloadError, match=match):
        resolve_model(REMOTE, lambda _: None)


@pytest.mark.parametrize(
    ("kind", "expected", "code"),
    [
        (hub_errors.GatedRepoError, ModelGatedError, "ModelGated"),
        (hub_errors.RepositoryNotFoundError, SourceNotFoundError, "ModelNotFound"),
        (hub_errors.RevisionNotFoundError, SourceNotFoundError, "ModelNotFound"),
        (hub_errors.HfHubHTTPError, SourceUnreachableError, "SourceUnreachable"),
    ],
)
def test_each_failure_has_its_name(
    hub: FakeHub, kind: type[hub_errors.HfHubHTTPError], expected: type[DownloadError], code: str
) -> None:
    hub.error = http_error(kind)
    with pytest.raises(expected) as caught:
        resolve_model(REMOTE, lambda _: None)
    assert caught.value.termination.code == code
    assert caught.value.termination.stage == "Downloading"
    assert "org/name" in str(caught.value)


def test_offline_the_cache_is_enough(hub: FakeHub) -> None:
    hub.is_offline = True
    assert resolve_model(REMOTE, lambda _: None) == hub.directory


def test_offline_without_a_cache(hub: FakeHub) -> None:
    hub.error = hub_errors.LocalEntryNotFoundError("Cannot find it\nand more")
    with pytest.raises(SourceUnreachableError, match=r"Cannot find it$") as caught:
        resolve_model(REMOTE, lambda _: None)
    assert "HF_HUB_OFFLINE" in caught.value.termination.hint


def test_failures_are_told_apart_in_a_process_that_has_used_nothing_of_the_library_yet(tmp_path: Path) -> None:
    script = """
from quire_server.download.errors import SourceUnreachableError
from quire_server.download.model_source import ModelSource, resolve_model
try:
    resolve_model(ModelSource(repo_id="org/name"), lambda readiness: None)
except SourceUnreachableError as error:
    print("told:", error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert ended.stdout.startswith("told: org/name could not be fetched")


def test_no_space_left(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hub.snapshot_download

    def fill_up(**options: Any) -> Any:
        if options.get("dry_run"):
            return whole(**options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill_up)
    with pytest.raises(NoSpaceError) as caught:
        resolve_model(REMOTE, lambda _: None)
    assert caught.value.termination.need_bytes == 2000


def test_a_model_is_fetched_once_into_the_cache_of_a_cluster(hub: FakeHub, tmp_path: Path) -> None:
    uri = parse_model_uri("hf://org/name")
    percents: list[float] = []
    arguments: dict[str, Any] = {"revision": None, "base": tmp_path, "cache": tmp_path / "cache"}
    path = fetch_model(uri, on_progress=percents.append, **arguments)
    assert path == tmp_path / "cache" / uri.cache_key(None)
    assert (path / COMPLETE_MARKER).is_file()
    assert percents[-1] == 100.0
    num_calls = len(hub.calls)
    assert fetch_model(uri, on_progress=percents.append, **arguments) == path
    assert len(hub.calls) == num_calls


def test_an_interrupted_fetch_is_not_complete(hub: FakeHub, tmp_path: Path) -> None:
    hub.error = http_error(hub_errors.HfHubHTTPError)
    uri = parse_model_uri("hf://org/name")
    with pytest.raises(SourceUnreachableError):
        fetch_model(uri, revision=None, base=tmp_path, cache=tmp_path, on_progress=lambda _: None)
    assert not (tmp_path / uri.cache_key(None) / COMPLETE_MARKER).exists()


def test_files_are_found_from_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    options: dict[str, Any] = {"revision": None, "base": tmp_path, "cache": tmp_path, "on_progress": lambda _: None}
    assert fetch_model(parse_model_uri("file://m"), **options) == tmp_path / "m"
    with pytest.raises(ConfigError, match=f"^spec.model.uri: {tmp_path}/n: no such file"):
        fetch_model(parse_model_uri("file://n"), **options)
    with pytest.raises(DownloadError, match="only hf://"):
        fetch_model(parse_model_uri("pvc://claim/x"), **options)
