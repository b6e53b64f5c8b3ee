"""Every error the server raises on purpose, and the one table that turns them into HTTP statuses.

An error crosses from one process to another as a `CodedError`, and is on the other side what it was: `encode_error`,
`decode_error`. A class of another module (a download's) crosses as its nearest ancestor of this one.

QuireError
├── InternalError                a bug, met while working on one request or call: 500
├── InvalidRequestError          the client's fault: 400, naming the field
│   ├── ContextLengthError       prompt and answer do not fit the model's context
│   └── PayloadTooLargeError     413
├── ModelNotFoundError           404
├── AuthenticationError          401
├── QueueFullError               429, with Retry-After
├── UnavailableError             503, with Retry-After
│   ├── ModelLoadingError
│   ├── DrainingError
│   └── EngineDeadError          no Retry-After: this process is ending
└── StartupError                 the process cannot serve; becomes the termination message
    ├── ConfigError              a flag or a configuration field
    ├── CheckpointError          a file or a tensor of the checkpoint
    ├── UnsupportedModelError    no family for this architecture
    └── OutOfMemoryError         weights or KV cache do not fit
"""

from typing import ClassVar, Final

import msgspec

from quire_contract.termination import TerminationMessage


class QuireError(Exception):
    """Base of all errors raised on purpose. `str(error)` is fit to show to a person."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"
    code: ClassVar[str | None] = None
    param: str | None = None
    retry_after_s: float | None = None


class InternalError(QuireError):
    """A bug. The log has it whole; who asked hears that it was not their fault."""

    code = "internal_error"


class InvalidRequestError(QuireError):
    """A request that can never succeed as it stands. `param` names the offending field."""

    status = 400
    type = "BadRequestError"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class PayloadTooLargeError(InvalidRequestError):
    status = 413
    code = "payload_too_large"


class ModelNotFoundError(QuireError):
    status = 404
    type = "NotFoundError"
    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist.")
        self.param = "model"


class AuthenticationError(QuireError):
    status = 401
    type = "AuthenticationError"
    code = "invalid_api_key"


class QueueFullError(QuireError):
    status = 429
    type = "RateLimitError"
    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(QuireError):
    status = 503
    type = "ServiceUnavailableError"
    code = "unavailable"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelLoadingError(UnavailableError):
    code = "model_loading"


class DrainingError(UnavailableError):
    code = "draining"


class EngineDeadError(UnavailableError):
    status = 500
    type = "InternalServerError"
    code = "engine_dead"


class StartupError(QuireError):
    """The process cannot serve. Carries what the termination message needs."""

    termination_code: ClassVar[str] = "StartupFailed"

    def __init__(
        self,
        message: str,
        *,
        stage: str = "Loading",
        hint: str = "",
        need_bytes: int | None = None,
        have_bytes: int | None = None,
    ) -> None:
        super().__init__(message)
        self.termination = TerminationMessage(
            code=self.termination_code,
            stage=stage,
            message=message,
            hint=hint,
            need_bytes=need_bytes,
            have_bytes=have_bytes,
        )


class ConfigError(StartupError):
    termination_code = "InvalidConfig"


class CheckpointError(StartupError):
    termination_code = "BadCheckpoint"


class UnsupportedModelError(StartupError):
    termination_code = "UnsupportedModel"


class OutOfMemoryError(StartupError):
    termination_code = "OutOfMemory"


class CodedError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A `QuireError` on its way from one process to another."""

    code: str
    """The name of its class, in `CODE_TO_CLASS`."""
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    termination: TerminationMessage | None = None
    """Of a `StartupError`."""


CODE_TO_CLASS: Final[dict[str, type[QuireError]]] = {
    kind.__name__: kind
    for kind in (
        QuireError,
        InternalError,
        InvalidRequestError,
        ContextLengthError,
        PayloadTooLargeError,
        ModelNotFoundError,
        AuthenticationError,
        QueueFullError,
        UnavailableError,
        ModelLoadingError,
        DrainingError,
        EngineDeadError,
        StartupError,
        ConfigError,
        CheckpointError,
        UnsupportedModelError,
        OutOfMemoryError,
    )
}


def encode_error(error: QuireError) -> CodedError:
    """Make of an error what can be sent."""
    return CodedError(
        code=next(kind.__name__ for kind in type(error).__mro__ if CODE_TO_CLASS.get(kind.__name__) is kind),
        message=str(error),
        param=error.param,
        retry_after_s=error.retry_after_s,
        termination=error.termination if isinstance(error, StartupError) else None,
    )


def decode_error(coded: CodedError) -> QuireError:
    """Return the error that was sent, of the same class; of a code that is not known here, a plain `QuireError`."""
    kind = CODE_TO_CLASS.get(coded.code, QuireError)
    if issubclass(kind, StartupError) and coded.termination is None:
        kind = QuireError  # without what a termination message needs it is none
    error = kind.__new__(kind, coded.message)  # not its constructor, which may make the message of something else
    error.param, error.retry_after_s = coded.param, coded.retry_after_s
    if isinstance(error, StartupError) and coded.termination is not None:
        error.termination = coded.termination
    return error
