"""What a download Job tells the operator: progress while it runs, and what it found when it is done.

Progress is the body of `GET /progress` on the Job's pod. Facts are the termination message of a Job that succeeded,
the content of the `.complete` marker, and an annotation of the volume, so that no later Job is needed to know them. A
Job that fails writes a `TerminationMessage` instead, with one of the codes below.
"""

from typing import Final

import msgspec

from quire_contract.memory.model_shape import ModelShape
from quire_contract.nesting import bounded_nesting

# Codes of a download's termination message; the operator turns them into condition reasons.
MODEL_GATED: Final = "ModelGated"
MODEL_NOT_FOUND: Final = "ModelNotFound"
NO_SPACE: Final = "NoSpace"
CHECKSUM_MISMATCH: Final = "ChecksumMismatch"
SOURCE_UNREACHABLE: Final = "SourceUnreachable"
"""The source did not answer; worth another try."""
MODEL_INVALID: Final = "ModelInvalid"
"""The files are there and are no model that can be served: no weights, or an unreadable config.json."""
DOWNLOAD_FAILED: Final = "DownloadFailed"


_OTHER_VERSION: Final = "the model was read by another version of Quire"
MAX_FACTS_BYTES: Final = 4096
"""What a termination message has room for."""


class DownloadProgress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """How far a download is."""

    done_bytes: int
    total_bytes: int | None = None
    """None until the files are listed."""
    bytes_per_second: float | None = None
    """Over the last few seconds."""
    eta_seconds: float | None = None
    message: str = ""
    """What goes on, where that is not the transfer: waiting for a lock, verifying, retrying and why."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel", tag="ModelFacts"):
    """A model in a volume, complete and verified."""

    path: str
    """What to serve, relative to the volume's root: a directory, or a .gguf file."""
    bytes: int
    """Size of the model's files."""
    revision: str | None = None
    """The commit, or the entity tag, that the files are of; None where the source has none."""
    shape: ModelShape | None = None
    """None where the architecture is not known: whether it fits cannot be told."""
    shape_error: str = ""
    """Why `shape` is None."""
    is_outdated: bool = False
    """The shape is there and another version's: reading the model again gives one. Known to the reader alone."""


def encode_facts(facts: ModelFacts) -> bytes:
    """Write facts. What was outdated is so no more: whoever writes it has just asked, and got nothing better."""
    return msgspec.json.encode(msgspec.structs.replace(facts, is_outdated=False))


def decode_facts(text: str | bytes) -> ModelFacts | None:
    """Read facts; None where the text is something else.

    Facts that another version wrote tell what they can: a shape that this one does not understand is left out, and they
    are outdated. What the files are still counts, so that a model that serves goes on; a download Job reads the shape
    anew.
    """
    try:
        with bounded_nesting():
            return msgspec.json.decode(text, type=ModelFacts)
    except msgspec.ValidationError:
        return _decode_without_shape(text)
    except ValueError:
        return None


def _decode_without_shape(text: str | bytes) -> ModelFacts | None:
    try:
        with bounded_nesting():
            fields = msgspec.json.decode(text)
    except ValueError:
        return None
    if not isinstance(fields, dict) or "shape" not in fields:
        return None
    try:
        fields |= {"shape": None, "shapeError": _OTHER_VERSION, "isOutdated": True}
        return msgspec.convert(fields, type=ModelFacts)
    except msgspec.ValidationError:
        return None
