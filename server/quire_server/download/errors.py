"""Why a model's files could not be brought here. Owns the error types; the codes are the contract's."""

from quire_contract import model_facts
from quire_server.shared.errors import StartupError

STAGE = "Downloading"


class DownloadError(StartupError):
    """The fetch failed, and the same fetch would fail again unless something is changed."""

    termination_code = model_facts.DOWNLOAD_FAILED

    def __init__(
        self, message: str, *, hint: str = "", need_bytes: int | None = None, have_bytes: int | None = None
    ) -> None:
        super().__init__(message, stage=STAGE, hint=hint, need_bytes=need_bytes, have_bytes=have_bytes)


class ModelGatedError(DownloadError):
    termination_code = model_facts.MODEL_GATED


class SourceNotFoundError(DownloadError):
    """No such repository, revision, bucket, prefix or file."""

    termination_code = model_facts.MODEL_NOT_FOUND


class SourceUnreachableError(DownloadError):
    """The source did not answer for as long as one waits; worth another try."""

    termination_code = model_facts.SOURCE_UNREACHABLE


class NoSpaceError(DownloadError):
    termination_code = model_facts.NO_SPACE


class ChecksumMismatchError(DownloadError):
    termination_code = model_facts.CHECKSUM_MISMATCH


class ModelInvalidError(DownloadError):
    """The files are there, and are no model that can be served."""

    termination_code = model_facts.MODEL_INVALID
