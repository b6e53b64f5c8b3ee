"""Every error the server raises on purpose, and the one table that turns them into HTTP statuses.

QuireError
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

from typing import ClassVar

from quire_contract.termination import TerminationMessage


class QuireError(Exception):
    """Base of all errors raised on purpose. `str(error)` is fit to show to a person."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"
    code: ClassVar[str | None] = None
    retry_after_s: float | None = None


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
