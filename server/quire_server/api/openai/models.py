"""The names under which the model is served."""

from starlette.requests import Request
from starlette.responses import Response

from quire_server.api.errors import json_response
from quire_server.api.openai.schemas.answers import ModelCard, ModelList, ModelPermission
from quire_server.api.state import get_frontend
from quire_server.frontend.frontend import Frontend
from quire_server.shared.errors import ModelNotFoundError


def resolve_model(frontend: Frontend, name: str | None) -> str:
    """Return the served name that a request means; none given means the first.

    Raises:
        ModelNotFoundError: it is not served here.
    """
    names = frontend.config.engine.model.served_model_names
    if not name:
        return names[0]
    if name not in names:
        raise ModelNotFoundError(name)
    return name


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    frontend = get_frontend(request)
    names = frontend.config.engine.model.served_model_names
    return json_response(ModelList(data=[_build_card(frontend, name) for name in names]))


async def get_model(request: Request) -> Response:
    """GET /v1/models/{model}."""
    frontend = get_frontend(request)
    return json_response(_build_card(frontend, resolve_model(frontend, request.path_params["model"])))


def _build_card(frontend: Frontend, name: str) -> ModelCard:
    info = frontend.client.info
    return ModelCard(
        id=name,
        created=frontend.created,
        root=frontend.config.engine.model.model,
        max_model_len=info.max_model_len if info else frontend.config.engine.model.max_model_len,
        permission=[ModelPermission(id=f"modelperm-{name}", created=frontend.created)],
    )
