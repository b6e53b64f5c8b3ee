"""The HTTP application: which path leads where, and what every request passes through on the way.

A factory without globals: what handlers need is in the `Frontend`.
"""

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire_contract import paths
from quire_server.api import health
from quire_server.api.auth import BearerAuth
from quire_server.api.bodies.ignored_fields import IGNORED_FIELDS_HEADER, IgnoredFields, IgnoredFieldsHeader
from quire_server.api.errors import EXCEPTION_HANDLERS, json_response
from quire_server.api.openai import chat, completions, models, tokenize
from quire_server.api.openai.schemas.answers import VersionResponse
from quire_server.api.openai.schemas.extras import KNOWN_EXTRAS
from quire_server.api.openapi import build_openapi
from quire_server.api.request_id import REQUEST_ID_HEADER, RequestIdEcho
from quire_server.api.state import get_frontend, set_state
from quire_server.api.version import server_version
from quire_server.frontend.frontend import Frontend
from quire_server.shared.config import ServerConfig


def create_app(frontend: Frontend) -> Starlette:
    """Build the application that serves one model."""
    app = Starlette(
        routes=build_routes(),
        middleware=_build_middleware(frontend.config),
        exception_handlers=EXCEPTION_HANDLERS,
    )
    set_state(app, frontend, IgnoredFields(frontend.metrics, KNOWN_EXTRAS))
    return app


def build_routes() -> list[Route]:
    return [
        Route("/v1/chat/completions", chat.create_chat_completion, methods=["POST"]),
        Route("/v1/completions", completions.create_completion, methods=["POST"]),
        Route(paths.MODELS, models.list_models, methods=["GET"]),
        Route(f"{paths.MODELS}/{{model:path}}", models.get_model, methods=["GET"]),
        Route("/tokenize", tokenize.tokenize, methods=["POST"]),
        Route("/detokenize", tokenize.detokenize, methods=["POST"]),
        Route("/version", _get_version, methods=["GET"]),
        Route(paths.HEALTH, health.health, methods=["GET"]),
        Route("/ping", health.health, methods=["GET", "POST"]),
        Route(paths.LIVEZ, health.livez, methods=["GET"]),
        Route(paths.READYZ, health.readyz, methods=["GET"]),
        Route(paths.METRICS, _get_metrics, methods=["GET"]),
        Route("/openapi.json", _get_openapi, methods=["GET"]),
    ]


def _build_middleware(config: ServerConfig) -> list[Middleware]:
    middleware = [
        Middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, IGNORED_FIELDS_HEADER],
        ),
        Middleware(IgnoredFieldsHeader),
    ]
    if config.enable_request_id_headers:
        middleware.insert(0, Middleware(RequestIdEcho))
    if config.api_keys:
        middleware.append(Middleware(BearerAuth, keys=config.api_keys))
    return middleware


async def _get_version(request: Request) -> Response:
    return json_response(VersionResponse(version=server_version()))


async def _get_metrics(request: Request) -> Response:
    metrics = get_frontend(request).metrics
    return Response(metrics.render(), headers={"Content-Type": metrics.content_type})


async def _get_openapi(request: Request) -> Response:
    return Response(msgspec.json.encode(build_openapi(server_version())), media_type="application/json")
