"""A repository of the Hugging Face Hub, or of a mirror of it ($HF_ENDPOINT), as a source.

The Hub library names the commit, lists the files and knows the token; the bytes are then read by range, so that a file
goes on where it was left and is verified (the library checks sizes only). The commit is asked once and pinned.
"""

from collections.abc import Iterator
from functools import partial
from typing import Final, NoReturn

import httpx2
from huggingface_hub import HfApi, get_session, get_token, hf_hub_url, hf_raise_for_status
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoSibling

from quire_contract.model_uri import ModelUri
from quire_contract.nesting import bounded_nesting
from quire_server.download.errors import (
    DownloadError,
    ModelGatedError,
    SourceNotFoundError,
    SourceUnreachableError,
)
from quire_server.download.http import check_worth_another_try, interruptions, read_range
from quire_server.download.selection import address_on_hub, choose_files
from quire_server.download.source import Checksum, Listing, RemoteFile

_API_TIMEOUT_S: Final = 30.0
_LIBRARY: Final = "quire"


class HubSource:
    """One repository, or one GGUF file of it, at one revision."""

    def __init__(self, uri: ModelUri, revision: str | None, token: str | None) -> None:
        self._repo_id = uri.repo_id
        self._file = uri.repo_file
        self._revision = revision
        self._commit: str | None = None
        self._token = token or get_token()
        self._headers = {"User-Agent": _LIBRARY} | ({"Authorization": f"Bearer {self._token}"} if self._token else {})

    def list_files(self) -> Listing:
        api = HfApi(token=self._token or False, library_name=_LIBRARY)
        try:
            with interruptions(), bounded_nesting():
                info = api.model_info(
                    self._repo_id, revision=self._revision, files_metadata=True, timeout=_API_TIMEOUT_S
                )
        except hub_errors.OfflineModeIsEnabled as error:
            raise SourceUnreachableError(f"{self._repo_id}: $HF_HUB_OFFLINE forbids asking for it.") from error
        except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError) as error:
            self._raise(error)
        except ValueError as error:
            raise DownloadError(
                f"{self._repo_id}: the Hub's answer is not the JSON that it should be: {error}."
            ) from error
        if info.sha is None:
            raise DownloadError(f"{self._repo_id}: the Hub does not say which commit {self._revision or 'it'} is.")
        self._commit = info.sha
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        names = choose_files(self._repo_id, siblings, partial(address_on_hub, self._repo_id), only=self._file)
        return Listing(files=tuple(_remote_file(siblings[name]) for name in names), revision=info.sha)

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        return read_range(get_session(), self._url(file.name), headers=self._headers, start=start, check=self._check)

    def _url(self, name: str) -> str:
        assert self._commit is not None, "list_files comes first"
        return hf_hub_url(self._repo_id, name, revision=self._commit)

    def _check(self, response: httpx2.Response) -> None:
        try:
            hf_raise_for_status(response)
        except hub_errors.HfHubHTTPError as error:
            self._raise(error)

    def _raise(self, error: Exception) -> NoReturn:
        """Raise what an answer of the Hub means."""
        if isinstance(error, hub_errors.GatedRepoError):
            raise self._gated(f"{self._repo_id} is gated") from error
        if isinstance(error, hub_errors.RepositoryNotFoundError):
            who = "the token that was given" if self._token else "whoever gives no token"
            raise SourceNotFoundError(
                f"{self._repo_id} does not exist, or is private and hidden from {who}.",
                hint="Check spec.model.uri; for a private model set spec.model.tokenSecretRef.",
            ) from error
        if isinstance(error, hub_errors.RevisionNotFoundError):
            raise SourceNotFoundError(
                f"{self._repo_id} has no revision {self._revision!r}.", hint="Check spec.model.revision."
            ) from error
        if not isinstance(error, hub_errors.HfHubHTTPError):
            raise SourceNotFoundError(f"{self._repo_id}: {error}") from error
        check_worth_another_try(error.response)
        status = error.response.status_code
        if status in (401, 403):
            raise self._gated(f"{self._repo_id} may not be read ({status})") from error
        if status == 404:
            raise SourceNotFoundError(f"{self._repo_id}: {error.response.url.path} does not exist.") from error
        raise DownloadError(f"{self._repo_id}: the Hub answered {status}.") from error

    def _gated(self, what: str) -> ModelGatedError:
        if self._token:
            hint = (
                "Accept the licence on the model's page with the account of the token, or name a Secret with another "
                "token in spec.model.tokenSecretRef."
            )
            return ModelGatedError(f"{what}, and the token that was given is refused.", hint=hint)
        hint = "Set spec.model.tokenSecretRef to a Secret that holds a token of an account that accepted the licence."
        return ModelGatedError(f"{what}, and no token was given.", hint=hint)


def _remote_file(sibling: RepoSibling) -> RemoteFile:
    checksum = None
    if sibling.lfs is not None:
        checksum = Checksum(kind="sha256", hex=sibling.lfs.sha256)
    elif sibling.blob_id is not None:
        checksum = Checksum(kind="git", hex=sibling.blob_id)
    return RemoteFile(name=sibling.rfilename, size_bytes=sibling.size or 0, checksum=checksum)
