"""What is asked of the engine that is not a request, and answered: a `Call`, and its one `Reply`.

A method is one struct here, in the union `Method`, and one line in the table of `loop`. Knows neither who asks
(`open_calls`) nor who does it.
"""

from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from quire_server.shared.errors import CodedError, QuireError, encode_error

R = TypeVar("R")

_encode = msgspec.msgpack.Encoder().encode


class EngineMethod(msgspec.Struct, Generic[R], frozen=True):
    """Something that the engine can be asked to do; its fields are the arguments, `R` is what comes back."""

    result_type: ClassVar[Any] = type(None)
    """`R`, for the decoder."""


class ResetPrefixCache(EngineMethod[None], frozen=True, tag=True):
    """Let no request find what was computed before now. The reply says that it is done; running requests go on."""


Method = ResetPrefixCache


class Call(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One use of a method."""

    call_id: int
    """Chosen by who asks, and used once."""
    method: Method


class Reply(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The end of a call: a result, or an error."""

    call_id: int
    result: msgspec.Raw = msgspec.Raw(_encode(None))
    """Encoded; of the method's `result_type`."""
    error: CodedError | None = None

    @classmethod
    def succeeded(cls, call_id: int, result: object) -> "Reply":
        return cls(call_id=call_id, result=msgspec.Raw(_encode(result)))

    @classmethod
    def failed(cls, call_id: int, error: QuireError) -> "Reply":
        return cls(call_id=call_id, error=encode_error(error))
