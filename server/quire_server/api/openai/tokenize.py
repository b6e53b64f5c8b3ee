"""/tokenize and /detokenize: what the model's tokenizer and chat template make of a text."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire_server.api.answering import prepare
from quire_server.api.body import decode_body
from quire_server.api.errors import json_response, long_json_response
from quire_server.api.openai.conversation import render_conversation
from quire_server.api.openai.models import resolve_model
from quire_server.api.openai.sampling import ModelLimits, check_token_ids
from quire_server.api.openai.schemas.answers import DetokenizeResponse, TokenizeResponse
from quire_server.api.openai.schemas.requests import DetokenizeRequest, TokenizeRequest
from quire_server.api.state import get_frontend
from quire_server.frontend.frontend import Frontend
from quire_server.shared.errors import InvalidRequestError

_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(request: Request) -> Response:
    """POST /tokenize."""
    frontend = get_frontend(request)
    body = await decode_body(request, _tokenize_decoder, frontend.config.max_request_body_bytes)
    resolve_model(frontend, body.model)
    token_ids = await prepare(request, _encode(frontend, body))

    def answer() -> Response:
        texts = [frontend.tokenizer.token_text(id_) for id_ in token_ids] if body.return_token_strs else None
        max_model_len = frontend.max_model_len
        return long_json_response(
            TokenizeResponse(count=len(token_ids), max_model_len=max_model_len, tokens=token_ids, token_strs=texts)
        )

    return await frontend.lanes.run(len(token_ids), answer)


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
    )
    return await frontend.encode(text, add_special_tokens=bool(body.add_special_tokens), is_cut=True, param="messages")


async def detokenize(request: Request) -> Response:
    """POST /detokenize."""
    frontend = get_frontend(request)
    body = await decode_body(request, _detokenize_decoder, frontend.config.max_request_body_bytes)
    resolve_model(frontend, body.model)
    check_token_ids(body.tokens, ModelLimits.of(frontend), "tokens")
    return json_response(DetokenizeResponse(prompt=await frontend.decode(body.tokens, skip_special_tokens=False)))
