"""Errors on their way between the processes: on the other side they are what they were."""

import msgspec
import pytest

import quire_server.download.errors  # noqa: F401 - classes of other modules have to cross too
from quire_contract.termination import TerminationMessage
from quire_server.download.errors import NoSpaceError
from quire_server.shared import errors
from quire_server.shared.errors import (
    AuthenticationError,
    CheckpointError,
    CodedError,
    ConfigError,
    ContextLengthError,
    DrainingError,
    EngineDeadError,
    InternalError,
    InvalidRequestError,
    ModelLoadingError,
    ModelNotFoundError,
    OutOfMemoryError,
    PayloadTooLargeError,
    QueueFullError,
    QuireError,
    StartupError,
    UnavailableError,
    UnsupportedModelError,
    decode_error,
    encode_error,
)

STATUSES = [
    (QuireError("a"), 500),
    (InternalError("a"), 500),
    (InvalidRequestError("a", "temperature"), 400),
    (InvalidRequestError("a"), 400),
    (ContextLengthError("a", "prompt"), 400),
    (PayloadTooLargeError("a"), 413),
    (ModelNotFoundError("gpt-9"), 404),
    (AuthenticationError("a"), 401),
    (QueueFullError("a", 2.5), 429),
    (UnavailableError("a", 3.0), 503),
    (ModelLoadingError("a"), 503),
    (DrainingError("a", 1.0), 503),
    (EngineDeadError("a"), 500),
    (StartupError("a", hint="b"), 500),
    (ConfigError("a", stage="Starting"), 500),
    (CheckpointError("a"), 500),
    (UnsupportedModelError("a"), 500),
    (OutOfMemoryError("a", need_bytes=2, have_bytes=1), 500),
]


def cross(error: QuireError) -> QuireError:
    encoded = msgspec.msgpack.encode(encode_error(error))
    return decode_error(msgspec.msgpack.decode(encoded, type=CodedError))


def all_classes(kind: type[QuireError]) -> set[type[QuireError]]:
    return {kind}.union(*(all_classes(child) for child in kind.__subclasses__()))


def test_every_class_has_a_code_of_its_own() -> None:
    here = {kind for kind in all_classes(QuireError) if kind.__module__ == errors.__name__}
    assert {type(error) for error, _ in STATUSES} == here
    assert len({encode_error(error).code for error, _ in STATUSES}) == len(here)


@pytest.mark.parametrize(("error", "status"), STATUSES, ids=lambda value: type(value).__name__)
def test_an_error_is_the_same_on_the_other_side(error: QuireError, status: int) -> None:
    crossed = cross(error)
    assert type(crossed) is type(error)
    assert (str(crossed), crossed.param, crossed.retry_after_s) == (str(error), error.param, error.retry_after_s)
    assert (crossed.status, crossed.type, crossed.code) == (status, error.type, error.code)
    if isinstance(error, StartupError):
        assert isinstance(crossed, StartupError)
        assert crossed.termination == error.termination


@pytest.mark.parametrize("kind", sorted(all_classes(QuireError), key=lambda kind: kind.__name__))
def test_a_class_of_any_module_crosses_with_its_status(kind: type[QuireError]) -> None:
    """The classes of tests and plug-ins too: they are found by what they are, not by their names."""
    error = kind.__new__(kind, "what happened")
    if isinstance(error, StartupError):
        error.termination = TerminationMessage(code="Some", stage="Loading", message="what happened")
    crossed = cross(error)
    assert isinstance(error, type(crossed))
    assert (str(crossed), crossed.status) == ("what happened", kind.status)


def test_a_download_that_fails_keeps_its_termination_message() -> None:
    error = NoSpaceError("full", need_bytes=10, have_bytes=1)
    crossed = cross(error)
    assert type(crossed) is StartupError
    assert crossed.termination == error.termination
    assert crossed.termination.code == NoSpaceError.termination_code


def test_a_name_alone_does_not_make_a_class_one_of_ours() -> None:
    impostor = type("AuthenticationError", (InvalidRequestError,), {})("a", "b")
    assert type(cross(impostor)) is InvalidRequestError


@pytest.mark.parametrize("code", ["FromTheFuture", "", "StartupError"])
def test_what_is_not_known_here_is_a_plain_error(code: str) -> None:
    error = decode_error(CodedError(code=code, message="a", param="b", retry_after_s=4.0))
    assert type(error) is QuireError
    assert (str(error), error.status, error.param, error.retry_after_s) == ("a", 500, "b", 4.0)
