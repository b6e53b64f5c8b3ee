"""From what a person calls a model to where its files are: a path, a `file://` URI, or a repository of the Hub.

Owns what the server does itself: the progress report, and what each failure of the Hub means to whoever started it;
which files make a model is `download.selection`'s. `resolve_model` leaves the files in the Hub
library's own cache, `fetch_model` in the layout that the volumes of a cluster have; what is there already is used
without a network. Blocking: run it in a thread.
"""

import errno
import glob
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quire_contract.model_uri import ModelUri, ModelUriError, Scheme, parse_model_uri
from quire_contract.paths import COMPLETE_MARKER
from quire_contract.phases import Phase, Readiness
from quire_contract.units import format_bytes
from quire_server.download.errors import (
    STAGE,
    DownloadError,
    ModelGatedError,
    NoSpaceError,
    SourceNotFoundError,
    SourceUnreachableError,
)
from quire_server.download.selection import (
    NOT_NEEDED,
    TEXT_FILES,
    address_on_hub,
    choose_files,
    model_path,
    parts_pattern,
)
from quire_server.shared.errors import ConfigError

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")

ReadinessReport = Callable[[Readiness], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from. One of `path` and `repo_id` is given."""

    path: Path | None = None
    repo_id: str | None = None
    file: str | None = None
    """One GGUF file of the repository, where one was chosen."""
    revision: str | None = None
    cache_dir: Path | None = None
    """None: the Hub library's own ($HF_HOME)."""
    token: str | None = None
    """None: what $HF_TOKEN or a login says."""


def parse_model_source(
    model: str, *, revision: str | None = None, cache_dir: Path | None = None, token: str | None = None
) -> ModelSource:
    """Say where a model comes from, without a network.

    Raises:
        ConfigError: neither a path that exists, nor a repository's name, nor a URI that this server fetches itself.
    """
    remote = {"revision": revision, "cache_dir": cache_dir, "token": token}
    if "://" in model:
        uri = _parse_uri(model)
        if uri.scheme is Scheme.HF:
            return ModelSource(repo_id=uri.repo_id, file=uri.repo_file, **remote)  # type: ignore[arg-type]
        return ModelSource(path=_existing(uri.local_path(Path.cwd()), model))
    path = Path(model).expanduser()
    if path.exists():
        return ModelSource(path=path)
    if _REPOSITORY.fullmatch(model) and path.suffix != ".gguf":
        return ModelSource(repo_id=model, **remote)  # type: ignore[arg-type]
    return ModelSource(path=_existing(path, model))


def _parse_uri(model: str) -> ModelUri:
    try:
        uri = parse_model_uri(model)
    except ModelUriError as error:
        raise ConfigError(f"--model: {error}", stage="Starting") from error
    if uri.scheme not in (Scheme.HF, Scheme.FILE):
        raise ConfigError(
            f"--model: `quire serve` fetches hf:// itself; {uri.scheme}:// is fetched into a directory first.",
            stage="Starting",
            hint="Use an LLMDeployment (`quire up`, or a cluster), or give the directory of the files.",
        )
    return uri


def _existing(path: Path, model: str) -> Path:
    if not path.exists():
        raise ConfigError(
            f"--model: {model!r} is neither an existing file or directory nor a repository `organisation/name`.",
            stage="Starting",
            hint="One GGUF file of a repository is hf://organisation/name/file.gguf; a revision goes into --revision.",
        )
    return path


def resolve_model(source: ModelSource, report: ReadinessReport) -> Path:
    """Return where the files are, after fetching them if need be.

    Raises:
        DownloadError: a subclass says why: gated, not found, unreachable, no space.
    """
    if source.path is not None:
        return source.path
    assert source.repo_id is not None
    report(Readiness(phase=Phase.DOWNLOADING, message=f"Looking up {source.repo_id}"))
    options = {"revision": source.revision, "cache_dir": source.cache_dir, "token": source.token}
    return _Download(source.repo_id, source.file, report, **options).run()


def fetch_model(
    uri: ModelUri,
    *,
    revision: str | None,
    base: Path,
    cache: Path,
    on_progress: Callable[[float], None],
) -> Path:
    """Return where a model's files are: as a relative file:// URI says from `base`, or in `cache`, fetched if need be.

    `on_progress` is told the percentage.

    Raises:
        StartupError: there is no such file, the scheme is for clusters only, or (DownloadError) the fetch failed.
    """
    if uri.scheme is Scheme.FILE:
        path = uri.local_path(base)
        if not path.exists():
            raise ConfigError(f"spec.model.uri: {path}: no such file or directory.", stage=STAGE)
        return path
    if uri.scheme is not Scheme.HF:
        raise DownloadError(f"{uri}: only hf:// and file:// are fetched on this machine.")
    directory = cache / uri.cache_key(revision)
    marker = directory / COMPLETE_MARKER
    if marker.is_file():
        return model_path(directory)

    def report(readiness: Readiness) -> None:
        if readiness.percent is not None:
            on_progress(readiness.percent)

    path = _Download(uri.repo_id, uri.repo_file, report, revision=revision, local_dir=directory).run()
    marker.touch()
    return path


class _Download:
    """One fetch of a repository's files, or of one GGUF file. `options` are the Hub's: revision, token, place."""

    def __init__(self, repo_id: str, file: str | None, report: ReadinessReport, **options: Any) -> None:
        import huggingface_hub
        import huggingface_hub.errors  # the package does not load it by itself

        self._hub = huggingface_hub
        self._repo_id = repo_id
        self._file = file
        self._report = report
        self._common: dict[str, Any] = {"repo_id": repo_id, "library_name": "quire", **options}
        self._total_bytes = 0

    def run(self) -> Path:
        errors = self._hub.errors
        try:
            return self._fetch()
        except errors.GatedRepoError as error:
            hint = "Accept the licence on the model's page, and give a token that may read it ($HF_TOKEN)."
            raise ModelGatedError(f"{self._repo_id} is gated.", hint=hint) from error
        except errors.RepositoryNotFoundError as error:
            message = f"{self._repo_id} does not exist, or is private and the token may not read it."
            raise SourceNotFoundError(message, hint="Check the name and $HF_TOKEN.") from error
        except errors.RevisionNotFoundError as error:
            revision = self._common["revision"]
            raise SourceNotFoundError(f"{self._repo_id} has no revision {revision!r}.") from error
        except errors.LocalEntryNotFoundError as error:
            raise self._unreachable(error) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                message = f"No space left for {self._repo_id} ({format_bytes(self._total_bytes)})."
                raise NoSpaceError(message, need_bytes=self._total_bytes or None) from error
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> SourceUnreachableError:
        first_line = str(error).partition("\n")[0]
        return SourceUnreachableError(
            f"{self._repo_id} could not be fetched, and is not complete in the cache: {first_line}",
            hint="Check the network, $HF_ENDPOINT and $HF_HUB_OFFLINE, or give a directory.",
        )

    def _fetch(self) -> Path:
        files = self._list()
        # Where the Hub cannot be asked, the cache must do.
        patterns = [*TEXT_FILES, "*.safetensors"] if self._file is None else [parts_pattern(self._file)]
        if files is not None:
            address = partial(address_on_hub, self._repo_id)
            names = choose_files(self._repo_id, [file.filename for file in files], address, only=self._file)
            patterns = [glob.escape(name) for name in names]
            missing = [file for file in files if file.filename in names and file.will_download]
            self._total_bytes = sum(file.file_size or 0 for file in missing)
        progress = _progress_bar(self._total_bytes, self._tell)
        path = self._hub.snapshot_download(
            **self._common, allow_patterns=patterns, ignore_patterns=list(NOT_NEEDED), tqdm_class=progress
        )
        return model_path(Path(path)) if self._file is None else Path(path) / self._file

    def _list(self) -> "list[DryRunFileInfo] | None":
        """Return the repository's files that could be part of a model; None where the Hub cannot be asked."""
        patterns = [*TEXT_FILES, "*.safetensors", "*.gguf"]
        try:
            files: list[DryRunFileInfo] = self._hub.snapshot_download(
                **self._common, allow_patterns=patterns, ignore_patterns=list(NOT_NEEDED), dry_run=True
            )
        except self._hub.errors.DryRunError as error:
            if isinstance(error.__cause__, self._hub.errors.HfHubHTTPError):
                raise error.__cause__ from error
            return None
        return files

    def _tell(self, done_bytes: int) -> None:
        total = self._total_bytes
        percent = min(100.0, 100.0 * done_bytes / total) if total else None
        message = f"{self._repo_id}: {format_bytes(done_bytes)} of {format_bytes(total)}"
        self._report(Readiness(phase=Phase.DOWNLOADING, message=message, percent=percent))


def _progress_bar(total_bytes: int, tell: Callable[[int], None]) -> type:
    """Return a silent tqdm whose byte counters are told. The library counts bytes received and bytes written."""
    from tqdm import tqdm

    class Progress(tqdm):  # type: ignore[type-arg]
        most_bytes: ClassVar[int] = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            self._is_bytes = options.get("unit") == "B"
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})
            self._num_bytes = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if self._is_bytes and n:
                self._num_bytes += int(n)
                if self._num_bytes > Progress.most_bytes:
                    Progress.most_bytes = self._num_bytes
                    tell(min(self._num_bytes, total_bytes) if total_bytes else self._num_bytes)
            return None

    return Progress
