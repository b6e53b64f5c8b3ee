"""The OpenAPI 3.1 description of the server, built from the structs that decode requests and encode answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from quire_contract.phases import Readiness
from quire_server.api.auth import PROTECTED_PATHS
from quire_server.api.openai.schemas import answers, requests

VERSION: Final = "3.1.0"
_JSON: Final = "application/json"
_REF_TEMPLATE: Final = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    request: type[msgspec.Struct] | None = None
    request_rule: Mapping[str, Any] | None = None
    """What the body must satisfy besides, where it lies across fields."""
    response: type[msgspec.Struct] | None = None
    """None: plain text or nothing."""
    chunk: type[msgspec.Struct] | None = None
    """What one event holds, where the answer may be a stream."""


OPERATIONS: Final = (
    Operation(
        method="post",
        path="/v1/chat/completions",
        summary="Answer a conversation",
        request=requests.ChatCompletionRequest,
        response=answers.ChatCompletion,
        chunk=answers.ChatCompletionChunk,
    ),
    Operation(
        method="post",
        path="/v1/completions",
        summary="Continue a text",
        request=requests.CompletionRequest,
        response=answers.Completion,
        chunk=answers.CompletionChunk,
    ),
    Operation(method="get", path="/v1/models", summary="Names served", response=answers.ModelList),
    Operation(method="get", path="/v1/models/{model}", summary="One name", response=answers.ModelCard),
    Operation(
        method="post",
        path="/tokenize",
        summary="Turn text or a conversation into token ids",
        request=requests.TokenizeRequest,
        request_rule={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]},
        response=answers.TokenizeResponse,
    ),
    Operation(
        method="post",
        path="/detokenize",
        summary="Turn token ids into text",
        request=requests.DetokenizeRequest,
        response=answers.DetokenizeResponse,
    ),
    Operation(method="get", path="/version", summary="Version of the server", response=answers.VersionResponse),
    Operation(method="get", path="/health", summary="200 while the server can answer, as vLLM has it"),
    Operation(method="get", path="/ping", summary="The same as /health"),
    Operation(method="post", path="/ping", summary="The same as /health"),
    Operation(method="get", path="/livez", summary="200 unless the engine has died or hangs"),
    Operation(method="get", path="/readyz", summary="200 when requests are taken", response=Readiness),
    Operation(method="get", path="/metrics", summary="Prometheus metrics"),
)


def build_openapi(version: str, operations: Sequence[Operation] = OPERATIONS) -> dict[str, Any]:
    """Describe the operations; a new dictionary each time."""
    structs: list[type[msgspec.Struct]] = [answers.ErrorResponse]
    for operation in operations:
        structs += [struct for struct in (operation.request, operation.response, operation.chunk) if struct]
    structs = list(dict.fromkeys(structs))
    schemas_of_structs, components = msgspec.json.schema_components(structs, ref_template=_REF_TEMPLATE)
    struct_to_schema = dict(zip(structs, schemas_of_structs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, struct_to_schema)
    return {
        "openapi": VERSION,
        "info": {"title": "Quire", "version": version, "description": "An OpenAI-compatible inference server."},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe(operation: Operation, struct_to_schema: dict[type[msgspec.Struct], Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.response:
        content[_JSON] = {"schema": struct_to_schema[operation.response]}
    if operation.chunk:
        alternatives = [struct_to_schema[operation.chunk], struct_to_schema[answers.ErrorResponse]]
        description = "What the data of one event holds; that of the last is [DONE]."
        content["text/event-stream"] = {"schema": {"anyOf": alternatives, "description": description}}
    success: dict[str, Any] = {"description": "Success."}
    if content:
        success["content"] = content
    error_schema = {_JSON: {"schema": struct_to_schema[answers.ErrorResponse]}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}{operation.path}".replace("/", "_").replace("{", "").replace("}", ""),
        "responses": {"200": success, "default": {"description": "An error.", "content": error_schema}},
    }
    if operation.request:
        body = {"schema": {**struct_to_schema[operation.request], **(operation.request_rule or {})}}
        described["requestBody"] = {"required": True, "content": {_JSON: body}}
    if "{model}" in operation.path:
        described["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.path.startswith(PROTECTED_PATHS):
        described["security"] = [{"bearer": []}, {}]  # {}: no key is asked for where none is configured
    return described
