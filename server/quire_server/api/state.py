"""What the application keeps for its handlers: the frontend, which `create_app` was given, and what was ignored."""

from starlette.applications import Starlette
from starlette.requests import Request

from quire_server.api.bodies.ignored_fields import IgnoredFields
from quire_server.frontend.frontend import Frontend


def set_state(app: Starlette, frontend: Frontend, ignored_fields: IgnoredFields) -> None:
    app.state.frontend = frontend
    app.state.ignored_fields = ignored_fields


def get_frontend(request: Request) -> Frontend:
    frontend: Frontend = request.app.state.frontend
    return frontend


def get_ignored_fields(request: Request) -> IgnoredFields:
    ignored_fields: IgnoredFields = request.app.state.ignored_fields
    return ignored_fields
