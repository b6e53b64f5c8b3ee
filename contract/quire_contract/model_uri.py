"""Model URIs: where a model's files come from, and the directory they are cached in.

Pure text: nothing here touches a file or a network. The cache directory's name is the same for a download Job in a
cluster and for `quire up`, so a volume filled by one can be read by the other.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from quire_contract.names import model_digest


class Scheme(StrEnum):
    HF = "hf"
    S3 = "s3"
    GS = "gs"
    HTTP = "http"
    HTTPS = "https"
    PVC = "pvc"
    OCI = "oci"
    FILE = "file"


class ModelUriError(ValueError):
    """The text is not a model URI. The message says what would be."""


_FORMS = {
    Scheme.HF: "hf://organisation/name (or hf://organisation/name/file.gguf)",
    Scheme.S3: "s3://bucket/prefix",
    Scheme.GS: "gs://bucket/prefix",
    Scheme.HTTP: "http://host/path",
    Scheme.HTTPS: "https://host/path",
    Scheme.PVC: "pvc://claim/path",
    Scheme.OCI: "oci://registry/image:tag",
    Scheme.FILE: "file:///absolute/path or file://relative/path",
}
_DOWNLOADED = {Scheme.HF, Scheme.S3, Scheme.GS, Scheme.HTTP, Scheme.HTTPS}

_HF_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_GGUF_PART = re.compile(r"[^\s/?#@:\\]+")
_HUB_PAGES = ("blob", "resolve", "tree")
"""What the Hub's own pages put before a revision and a file."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_CLAIM = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
_IMAGE = re.compile(r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(?:@sha256:[0-9a-f]{64})?")
_DIGEST = re.compile(r"[^@]*@sha256:[^@]*")
_QUERY = re.compile(r"([?#])")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUri:
    """A parsed model URI. `str(uri)` is its canonical text."""

    scheme: Scheme
    authority: str
    """hf: organisation, or empty; s3, gs: bucket; http(s), oci: host and port; pvc: claim; file: empty."""
    path: str
    """hf: name, and a GGUF file behind it where one is chosen; pvc, s3, gs, http(s): without the leading slash;
    oci: image, tag and digest; file: as written."""

    def __str__(self) -> str:
        if self.scheme is Scheme.FILE:
            return f"file://{self.path}"
        return f"{self.scheme}://{'/'.join(part for part in (self.authority, self.path) if part)}"

    @property
    def shown(self) -> str:
        """The URI as people and logs are shown it: the query of a URL may hold a signature."""
        return str(self).partition("?")[0]

    @property
    def last_part(self) -> str:
        """The end of the path: of a URL, the name of its file."""
        return self.path.partition("?")[0].rpartition("/")[2]

    @property
    def is_downloaded(self) -> bool:
        """Whether the files are copied into the cache first; the others are used where they are."""
        return self.scheme in _DOWNLOADED

    @property
    def repo_id(self) -> str:
        """The Hub's name of the model: hf only."""
        assert self.scheme is Scheme.HF, self
        name = self.path.partition("/")[0]
        return f"{self.authority}/{name}" if self.authority else name

    @property
    def repo_file(self) -> str | None:
        """The GGUF file of the repository that was chosen, the first of its parts where it has several: hf only."""
        assert self.scheme is Scheme.HF, self
        return self.path.partition("/")[2] or None

    def local_path(self, base: Path) -> Path:
        """Return the file or directory that a file:// URI names; a relative one starts at `base`.

        A link at the end is not followed, because its own name may be what tells a .gguf file.
        """
        assert self.scheme is Scheme.FILE, self
        path = base / self.path
        return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name

    def cache_key(self, revision: str | None = None) -> str:
        """Name the cache directory of this model at a revision: readable, filesystem-safe, and stable for ever."""
        readable = _UNSAFE.sub("-", self.last_part or self.authority).strip("-.")[:48]
        return f"{readable or self.scheme}-{model_digest(str(self), revision)}"


def parse_model_uri(text: str) -> ModelUri:
    """Parse a model URI.

    Raises:
        ModelUriError: no scheme or an unknown one (the message lists all), or parts that the scheme cannot have.
    """
    scheme_text, separator, rest = text.partition("://")
    if not separator or scheme_text not in Scheme.__members__.values():
        known = ", ".join(_FORMS.values())
        raise ModelUriError(f"{_without_secrets(text)!r} is not a model URI; write one of {known}")
    scheme = Scheme(scheme_text)
    if any(c.isspace() or ord(c) < 32 for c in text):
        raise ModelUriError(f"{_without_secrets(text)!r} holds white space; write {_FORMS[scheme]}")
    parse = {Scheme.HF: _parse_hf, Scheme.PVC: _parse_pvc, Scheme.OCI: _parse_oci, Scheme.FILE: _parse_file}
    return parse.get(scheme, _parse_remote)(scheme, rest)


def _refuse(scheme: Scheme, rest: str, why: str) -> ModelUriError:
    return ModelUriError(f"'{_without_secrets(f'{scheme}://{rest}')}': {why}; write {_FORMS[scheme]}")


def _without_secrets(text: str) -> str:
    """Return a URI as it may be shown: a password may stand before an @, and a query or a fragment hold a signature."""
    if _may_hold_password(text):
        scheme, separator, _ = text.partition("://")
        return f"{scheme}://…" if separator else "…"
    before, *mark_and_rest = _QUERY.split(text, maxsplit=1)
    return f"{before}{mark_and_rest[0]}…" if mark_and_rest else before


def _quote(part: str, rest: str) -> str:
    """Quote a part of what follows the scheme, as far as it may be shown."""
    return repr("…" if _may_hold_password(rest) else _without_secrets(part))


def _may_hold_password(text: str) -> bool:
    return "@" in text and not _DIGEST.fullmatch(text)


def _parse_hf(scheme: Scheme, rest: str) -> ModelUri:
    parts = rest.rstrip("/").split("/")
    name, file = parts[:2], parts[2:]
    if "@" in rest:
        raise _refuse(scheme, rest, "a branch, tag or commit is given by model.revision (--revision), not behind an @")
    if ":" in name[-1]:
        raise _refuse(scheme, rest, "a quantisation is chosen by the name of its file")
    for part in name:
        if not _HF_PART.fullmatch(part) or ".." in part:
            raise _refuse(scheme, rest, f"{_quote(part, rest)} cannot be part of a model's name on the Hub")
    if file:
        _check_hf_file(file, rest)
    return ModelUri(scheme=scheme, authority=name[0] if len(name) == 2 else "", path="/".join([name[-1], *file]))


def _check_hf_file(parts: list[str], rest: str) -> None:
    """Raise unless what stands behind a repository is one of its GGUF files: a subfolder cannot be served."""
    if parts[0] in _HUB_PAGES:
        raise _refuse(Scheme.HF, rest, f"this is a page of the Hub: leave out /{parts[0]} and the revision behind it")
    if not parts[-1].endswith(".gguf"):
        why = "a subfolder is not served: name one GGUF file, or bring the folder into a bucket or a volume"
        raise _refuse(Scheme.HF, rest, why)
    for part in parts:
        if not _GGUF_PART.fullmatch(part) or part in (".", ".."):
            raise _refuse(Scheme.HF, rest, f"{_quote(part, rest)} cannot be part of a file's name")


def _parse_pvc(scheme: Scheme, rest: str) -> ModelUri:
    claim, _, path = rest.partition("/")
    if len(claim) > 253 or not _CLAIM.fullmatch(claim):
        raise _refuse(
            scheme, rest, f"{_quote(claim, rest)} is not the name of a PersistentVolumeClaim (a lower-case DNS name)"
        )
    path = path.strip("/")
    if ".." in path.split("/"):
        raise _refuse(scheme, rest, "the path must stay inside the volume")
    return ModelUri(scheme=scheme, authority=claim, path=path)


def _parse_oci(scheme: Scheme, rest: str) -> ModelUri:
    host, _, image = rest.partition("/")
    if not _HOST.fullmatch(host) or not _IMAGE.fullmatch(image):
        raise _refuse(scheme, rest, "this is not an image reference with its registry")
    return ModelUri(scheme=scheme, authority=host, path=image)


def _parse_file(scheme: Scheme, rest: str) -> ModelUri:
    path = rest if rest == "/" else rest.rstrip("/")
    if not path or "\0" in path:
        raise _refuse(scheme, rest, "no path is given")
    return ModelUri(scheme=scheme, authority="", path=path)


def _parse_remote(scheme: Scheme, rest: str) -> ModelUri:
    authority, _, path = rest.partition("/")
    if "@" in authority:
        raise _refuse(scheme, rest, "credentials do not belong in a URI; name a Secret in model.tokenSecretRef")
    is_bucket = scheme in (Scheme.S3, Scheme.GS)
    if not (_BUCKET if is_bucket else _HOST).fullmatch(authority):
        raise _refuse(scheme, rest, f"{_quote(authority, rest)} is not {'a bucket' if is_bucket else 'a host'}")
    path = path.rstrip("/") if is_bucket else path
    if not is_bucket and not path:
        raise _refuse(scheme, rest, "the URL of a file is needed, not of a host")
    if ".." in path.split("/"):
        raise _refuse(scheme, rest, "the path must not contain '..'")
    return ModelUri(scheme=scheme, authority=authority, path=path)
