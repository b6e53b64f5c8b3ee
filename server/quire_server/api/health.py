"""Probes. They read what the engine client already knows and never wait for the engine.

`/livez`: should this process be killed? `/readyz`: should it get requests? `/health`: vLLM's mixture of the two.
"""

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from quire_contract.phases import Phase
from quire_server.api.errors import json_response
from quire_server.api.state import get_frontend


async def livez(request: Request) -> Response:
    """200 unless the engine has died or hangs; the body says why not."""
    death = get_frontend(request).client.death
    if death is None:
        return PlainTextResponse("ok")
    return PlainTextResponse(f"{death.code}: {death.message}", HTTPStatus.SERVICE_UNAVAILABLE)


async def readyz(request: Request) -> Response:
    """200 when requests are taken; the body says which phase this is."""
    readiness = get_frontend(request).readiness
    is_ready = readiness.phase is Phase.READY
    return json_response(readiness, HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE)


async def health(request: Request) -> Response:
    """200 with no body once the model is loaded and as long as the engine lives; draining changes nothing."""
    frontend = get_frontend(request)
    if frontend.client.death is not None:
        return await livez(request)
    if frontend.client.info is None:
        return json_response(frontend.readiness, HTTPStatus.SERVICE_UNAVAILABLE)
    return Response()
