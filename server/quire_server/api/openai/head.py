"""What an answer is called: its id, its time, and what it was made by."""

import time
import uuid
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from quire_server.api.openai.models import resolve_model
from quire_server.api.openai.schemas.requests import GenerationFields
from quire_server.api.request_id import REQUEST_ID_HEADER
from quire_server.api.version import system_fingerprint
from quire_server.frontend.frontend import Frontend
from quire_server.shared.errors import InvalidRequestError

MAX_REQUEST_ID_LENGTH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What the answer and every chunk of it repeat."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def build_head(
    http_request: Request, frontend: Frontend, request: GenerationFields, *, prefix: Literal["chatcmpl", "cmpl"]
) -> AnswerHead:
    """Name the answer: after the client's own id for the request, where it gave one.

    Raises:
        ModelNotFoundError: the model is not served here.
        InvalidRequestError: the id is too long.
    """
    request_id = http_request.headers.get(REQUEST_ID_HEADER) or request.request_id or uuid.uuid4().hex
    if len(request_id) > MAX_REQUEST_ID_LENGTH:
        message = f"The request id must have at most {MAX_REQUEST_ID_LENGTH} characters."
        raise InvalidRequestError(message, param="request_id")
    return AnswerHead(
        id=f"{prefix}-{request_id}",
        created=int(time.time()),
        model=resolve_model(frontend, request.model),
        system_fingerprint=system_fingerprint(frontend),
    )
