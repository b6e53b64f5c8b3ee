"""One download from beginning to end: look, lock, list, make sure of the room, fetch, look at the model, publish."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quire_contract.model_facts import ModelFacts
from quire_contract.model_uri import ModelUri, Scheme
from quire_contract.units import format_bytes
from quire_server.download.errors import DownloadError, ModelInvalidError, SourceNotFoundError
from quire_server.download.facts import read_facts, size_of
from quire_server.download.progress import Meter
from quire_server.download.source import Source
from quire_server.download.transfer import DEFAULT_RETRY, RetryPolicy, Transfer, list_files
from quire_server.download.volume import ModelDirectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadRequest:
    """What to bring where."""

    uri: ModelUri
    revision: str | None = None
    directory: Path
    """The volume's root."""
    token: str | None = None
    check_path: str | None = None
    """pvc:// only: where in the directory the model is; None: where the URI says."""
    retry: RetryPolicy = DEFAULT_RETRY


def download(request: DownloadRequest, meter: Meter) -> ModelFacts:
    """Bring a model into a volume, unless it is there, and say what it is. Blocking.

    Raises:
        DownloadError: a subclass says why. What has arrived stays, and the next call goes on from there.
    """
    if request.uri.scheme is Scheme.PVC:
        return _check_volume(request, meter)
    key = request.uri.cache_key(request.revision)
    model = ModelDirectory(request.directory, key)
    source = _open_source(request)
    facts = _complete_facts(model, meter)
    if facts is not None and facts == model.read_facts():
        return facts
    with model.locked(lambda: meter.say("waiting for another download of this model")):
        facts = _complete_facts(model, meter)
        if facts is None:
            return _fetch(request, source(), model, meter)
        if facts != model.read_facts():
            model.write_facts(facts, model.path)
        return facts


def _complete_facts(model: ModelDirectory, meter: Meter) -> ModelFacts | None:
    """Return the facts of a model that is there, all of it; None where it is to be fetched."""
    if not model.is_marked():
        return None
    facts = model.read_facts()
    size = size_of(model.path)
    if facts is None:  # `quire up` makes the marker, and leaves it empty
        facts = read_facts(model.path, model.path.name, None)
    elif facts.bytes != size or not (model.volume / facts.path).exists():
        logger.warning(
            "%s was complete with %s and now has %s: fetching what is missing",
            model.path, format_bytes(facts.bytes), format_bytes(size),
        )  # fmt: skip
        return None
    elif facts.shape is None:  # this version may know the model, or understand what another one wrote
        facts = read_facts(model.path, model.path.name, facts.revision)
    meter.start(facts.bytes, facts.bytes)
    return facts


def _fetch(request: DownloadRequest, source: Source, model: ModelDirectory, meter: Meter) -> ModelFacts:
    what = request.uri.shown
    meter.say(f"listing {what}")
    listing = list_files(source, what, meter, request.retry)
    present = model.prepare(listing.files)
    model.require_space(listing.size_bytes - present, what)
    logger.info(
        "%s at %s: %d files, %s, of which %s are here",
        what, listing.revision or "no revision", len(listing.files),
        format_bytes(listing.size_bytes), format_bytes(present),
    )  # fmt: skip
    meter.start(listing.size_bytes, present)
    Transfer(source, model, meter, request.retry).run(listing.files)
    meter.say("reading the model's shape")
    facts = read_facts(model.staging, model.path.name, listing.revision)
    model.publish(facts)
    meter.say("")
    return facts


def _check_volume(request: DownloadRequest, meter: Meter) -> ModelFacts:
    """Look at a model that somebody else has put into a volume. Writes nothing."""
    inside = (request.uri.path if request.check_path is None else request.check_path).strip("/") or "."
    root = request.directory / inside
    if ".." in Path(inside).parts or not root.resolve().is_relative_to(request.directory.resolve()):
        raise ModelInvalidError(f"{request.uri}: {inside} leads out of the volume.")
    if not root.exists():
        raise SourceNotFoundError(f"{request.uri}: there is no {inside} in the volume.", hint="Check spec.model.uri.")
    if root.is_file() and root.suffix != ".gguf":
        raise ModelInvalidError(
            f"{request.uri}: {inside} is neither a model's directory nor a .gguf file.", hint="Check spec.model.uri."
        )
    meter.say(f"looking at {inside}")
    try:
        facts = read_facts(root, inside, None)
    except OSError as error:
        raise DownloadError(
            f"{request.uri}: {error.filename} cannot be read: {error.strerror}.",
            hint="The files must be readable for this user: set fsGroup, or make them readable for all.",
        ) from error
    meter.start(facts.bytes, facts.bytes)
    return facts


def _open_source(request: DownloadRequest) -> Callable[[], Source]:
    """Return what opens the source. Its library is loaded then, not for a model that is there already."""

    def open_hub() -> Source:
        from quire_server.download.hub import HubSource

        return HubSource(request.uri, request.revision, request.token)

    def open_http() -> Source:
        from quire_server.download.http import HttpSource

        return HttpSource(request.uri, request.token)

    def open_s3() -> Source:
        from quire_server.download.buckets import S3Source

        return S3Source(request.uri)

    def open_gcs() -> Source:
        from quire_server.download.buckets import GcsSource

        return GcsSource(request.uri)

    openers: dict[Scheme, Callable[[], Source]] = {
        Scheme.HF: open_hub,
        Scheme.HTTP: open_http,
        Scheme.HTTPS: open_http,
        Scheme.S3: open_s3,
        Scheme.GS: open_gcs,
    }
    if request.uri.scheme not in openers:
        why = "is mounted as an image volume" if request.uri.scheme is Scheme.OCI else "names files of this machine"
        raise DownloadError(
            f"{request.uri} is not downloaded: {request.uri.scheme}:// {why}.",
            hint=f"Download one of {', '.join(f'{scheme}://' for scheme in openers)}, or check pvc://claim/path.",
        )
    return openers[request.uri.scheme]
