"""What the application keeps for its handlers: the frontend, which `create_app` was given."""

from starlette.applications import Starlette
from starlette.requests import Request

from quire_server.frontend.frontend import Frontend


def set_frontend(app: Starlette, frontend: Frontend) -> None:
    app.state.frontend = frontend


def get_frontend(request: Request) -> Frontend:
    frontend: Frontend = request.app.state.frontend
    return frontend
