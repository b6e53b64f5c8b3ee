"""/tokenize and /detokenize: what the model's tokenizer and chat template make of a text."""

from starlette.requests import Request
from starlette.responses import Response

from quire_server.api.answering import prepare
from quire_server.api.bodies.lenient import LenientDecoder
from quire_server.api.errors import json_response, long_json_response
from quire_server.api.openai.conversation import render_conversation
from quire_server.api.openai.models import resolve_model
from quire_server.api.openai.reading import read_request
from quire_server.api.openai.sampling import ModelLimits, check_token_ids, refuse_unserved_fields
from quire_server.api.openai.schemas.answers import DetokenizeResponse, TokenizeResponse
from quire_server.api.openai.schemas.requests import DetokenizeRequest, TokenizeRequest
from quire_server.api.state import get_frontend
from quire_server.frontend.frontend import Frontend
from quire_server.shared.errors import InvalidRequestError

_tokenize_decoder = LenientDecoder(TokenizeRequest)
_detokenize_decoder = LenientDecoder(DetokenizeRequest)


async def tokenize(request: Request) -> Response:
    """POST /tokenize."""
    frontend = get_frontend(request)
    body = await read_request(request, _tokenize_decoder)
    resolve_model(frontend, body.model)
    refuse_unserved_fields(body, served=("tools",))
    token_ids = await prepare(request, _encode(frontend, body))

    def answer() -> Response:
        texts = _vocabulary_strings(frontend, token_ids) if body.return_token_strs else None
        max_model_len = frontend.max_model_len
        return long_json_response(
            TokenizeResponse(count=len(token_ids), max_model_len=max_model_len, tokens=token_ids, token_strs=texts)
        )

    return await frontend.lanes.run(len(token_ids), answer)


def _vocabulary_strings(frontend: Frontend, token_ids: list[int]) -> list[str]:
    return [frontend.tokenizer.vocabulary_string(token_id) for token_id in token_ids]


async def _encode(frontend: Frontend, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Give exactly one of `prompt` and `messages`.", param="prompt")
    if body.prompt is not None:
        return await frontend.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False, is_cut=True)
    assert body.messages is not None
    text = await render_conversation(
        frontend,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs,
        tools=body.tools,
    )
    return await frontend.encode(text, add_special_tokens=bool(body.add_special_tokens), is_cut=True, param="messages")


async def detokenize(request: Request) -> Response:
    """POST /detokenize."""
    frontend = get_frontend(request)
    body = await read_request(request, _detokenize_decoder)
    resolve_model(frontend, body.model)
    check_token_ids(body.tokens, ModelLimits.of(frontend), "tokens")
    return json_response(DetokenizeResponse(prompt=await frontend.decode(body.tokens, skip_special_tokens=False)))
