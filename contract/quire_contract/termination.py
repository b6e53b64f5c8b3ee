"""The termination message: how a process says why it ended, and how the operator reads it.

Kubernetes copies the last 4096 bytes of the termination log into the container's status. A process of ours writes one
JSON object there, so that a condition can name the cause and the cure instead of an exit code.
"""

import os
from pathlib import Path

import msgspec

from quire_contract.nesting import bounded_nesting
from quire_contract.paths import TERMINATION_LOG, TERMINATION_LOG_ENV

MAX_BYTES = 4096


class TerminationMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """Why a process ended. `code` is a CamelCase word fit for a condition's reason, such as `OutOfMemory`."""

    code: str
    stage: str
    message: str
    need_bytes: int | None = None
    have_bytes: int | None = None
    hint: str = ""


def encode_termination(message: TerminationMessage) -> bytes:
    """Encode as JSON of at most 4096 bytes, shortening the message, which is the only unbounded part in practice."""
    encoded = msgspec.json.encode(message)
    excess = len(encoded) - MAX_BYTES
    if excess <= 0:
        return encoded
    kept = message.message.encode()[: -(excess + 64)].decode(errors="ignore")
    return msgspec.json.encode(msgspec.structs.replace(message, message=kept + " … (shortened)"))[:MAX_BYTES]


def decode_termination(text: str | bytes) -> TerminationMessage | None:
    """Read a termination log; None where it is not ours (a crash before Python, another image)."""
    try:
        with bounded_nesting():
            return msgspec.json.decode(text, type=TerminationMessage)
    except ValueError:
        return None


def write_termination(message: TerminationMessage) -> None:
    """Write a message to the termination log, if there is one."""
    write_termination_log(encode_termination(message))


def write_termination_log(content: bytes) -> None:
    """Write to the termination log if there is one: in a pod, or where QUIRE_TERMINATION_LOG names a file."""
    named = os.environ.get(TERMINATION_LOG_ENV)
    path = Path(named or TERMINATION_LOG)
    if named or path.exists():
        try:
            path.write_bytes(content)
        except OSError:
            return  # the process is ending; its log already carries the same message
