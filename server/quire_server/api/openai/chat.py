"""POST /v1/chat/completions."""

import functools

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from quire_server.api.body import decode_body
from quire_server.api.health import get_frontend
from quire_server.api.openai.conversation import content_texts, render_conversation
from quire_server.api.openai.generation import (
    Answer,
    Generation,
    Prompt,
    ReplyHead,
    answer_whole,
    build_head,
    stream_events,
    wants_usage,
)
from quire_server.api.openai.logprobs import build_chat_logprobs, build_prompt_logprobs
from quire_server.api.openai.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ResponseMessage,
)
from quire_server.api.openai.sampling import (
    ModelLimits,
    SamplingDefaults,
    build_sampling_params,
    check_prompt,
    fit_max_tokens,
    refuse_unserved,
    truncate_prompt,
)
from quire_server.api.openai.schemas import ChatCompletionRequest
from quire_server.api.sse import EventStream, encode_event
from quire_server.errors import InvalidRequestError
from quire_server.frontend import Frontend
from quire_server.output_processor import CompletionDelta
from quire_server.sampling_params import MAX_LOGPROBS

_decoder = msgspec.json.Decoder(ChatCompletionRequest)


async def create_chat_completion(http_request: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    frontend = get_frontend(http_request)
    request = await decode_body(http_request, _decoder, frontend.config.max_request_body_bytes)
    head = build_head(http_request, frontend, request, prefix="chatcmpl")
    refuse_unserved(request, frontend.config.engine.scheduler.policy)
    prompt = await _build_prompt(frontend, request)
    generation = await Generation.start(frontend, request, [prompt], head.id)
    role = _role(frontend, request)
    if not request.stream:
        build = functools.partial(_build_whole, request, head, role, generation)
        return await answer_whole(http_request, generation, build)
    writer = _ChunkWriter(request, head, role, generation, *wants_usage(frontend, request))
    return EventStream(stream_events(generation, writer.build_chunk, writer.build_last), generation.aclose)


async def _build_prompt(frontend: Frontend, request: ChatCompletionRequest) -> Prompt:
    limits = ModelLimits.of(frontend)
    defaults = SamplingDefaults(**frontend.generation_defaults)
    template_kwargs = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        template_kwargs.setdefault("reasoning_effort", request.reasoning_effort)
    text = await render_conversation(
        frontend,
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        template_kwargs=template_kwargs,
    )
    # The template writes the special tokens itself.
    token_ids = await frontend.encode(text, add_special_tokens=bool(request.add_special_tokens))
    token_ids = truncate_prompt(token_ids, request, limits)
    check_prompt(token_ids, limits, "messages")
    sampling_params = build_sampling_params(
        request,
        defaults,
        limits,
        max_tokens=fit_max_tokens(request, defaults, limits, len(token_ids)),
        logprobs=_num_logprobs(request),
        prompt_logprobs=request.prompt_logprobs,
    )
    return Prompt(token_ids=token_ids, sampling_params=sampling_params, echo=_echo(frontend, request))


def _num_logprobs(request: ChatCompletionRequest) -> int | None:
    num_top = request.top_logprobs or 0
    if not 0 <= num_top <= MAX_LOGPROBS:
        raise InvalidRequestError(f"top_logprobs must be in [0, {MAX_LOGPROBS}], got {num_top}.", param="top_logprobs")
    if num_top and not request.logprobs:
        raise InvalidRequestError("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    return num_top if request.logprobs else None


def _role(frontend: Frontend, request: ChatCompletionRequest) -> str:
    is_new_turn = request.add_generation_prompt is not False and not request.continue_final_message
    return frontend.config.response_role if is_new_turn else request.messages[-1].role


def _echo(frontend: Frontend, request: ChatCompletionRequest) -> str:
    last = request.messages[-1]
    is_shown = request.echo and last.role == _role(frontend, request)
    return "\n".join(content_texts(last, f"messages[{len(request.messages) - 1}].content")) if is_shown else ""


def _build_whole(
    request: ChatCompletionRequest, head: ReplyHead, role: str, generation: Generation, answers: list[Answer]
) -> ChatCompletion:
    prompt = generation.prompt_of(0)
    as_ids = bool(request.return_tokens_as_token_ids)
    choices = [
        ChatChoice(
            index=index,
            message=ResponseMessage(role=role, content=prompt.echo + answer.text),
            logprobs=build_chat_logprobs(answer.logprobs, as_ids=as_ids) if request.logprobs else None,
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
            token_ids=answer.token_ids if request.return_token_ids else UNSET,
        )
        for index, answer in enumerate(answers)
    ]
    has_prompt_logprobs = request.prompt_logprobs is not None
    return ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=choices,
        usage=generation.usage(),
        system_fingerprint=head.system_fingerprint,
        prompt_logprobs=build_prompt_logprobs(answers[0].prompt_logprobs) if has_prompt_logprobs else UNSET,
        prompt_token_ids=prompt.token_ids if request.return_token_ids else UNSET,
    )


class _ChunkWriter:
    """Turns deltas into events. Per choice the first has the role, the last the finish reason."""

    def __init__(
        self,
        request: ChatCompletionRequest,
        head: ReplyHead,
        role: str,
        generation: Generation,
        has_usage: bool,
        has_continuous_usage: bool,
    ) -> None:
        self._head = head
        self._role = role
        self._generation = generation
        self._has_usage = has_usage
        self._has_continuous_usage = has_continuous_usage
        self._has_ids = bool(request.return_token_ids)
        self._as_ids = bool(request.return_tokens_as_token_ids)
        self._started: set[int] = set()

    def build_chunk(self, index: int, delta: CompletionDelta) -> bytes:
        """Encode what a delta adds; empty where it adds nothing that is shown."""
        first = b"" if index in self._started else self._start(index)
        finish_reason = delta.finish_reason
        if not (delta.text or finish_reason or delta.logprobs or (self._has_ids and delta.token_ids)):
            return first
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=delta.text) if delta.text or finish_reason is None else ChatDelta(),
            logprobs=build_chat_logprobs(delta.logprobs, as_ids=self._as_ids) if delta.logprobs else None,
            finish_reason=finish_reason,
            stop_reason=UNSET if finish_reason is None else delta.stop_reason,
            token_ids=list(delta.token_ids) if self._has_ids else UNSET,
        )
        return first + self._encode([choice], is_last=finish_reason is not None)

    def build_last(self) -> bytes:
        """Encode the usage, where it was asked for."""
        return self._encode([], has_usage=True, is_last=True) if self._has_usage else b""

    def _start(self, index: int) -> bytes:
        self._started.add(index)
        prompt = self._generation.prompt_of(index)
        choice = ChatChunkChoice(index=index, delta=ChatDelta(role=self._role, content=""))
        first = self._encode([choice], prompt_token_ids=prompt.token_ids if self._has_ids else UNSET)
        if prompt.echo:
            first += self._encode([ChatChunkChoice(index=index, delta=ChatDelta(content=prompt.echo))])
        return first

    def _encode(
        self,
        choices: list[ChatChunkChoice],
        *,
        prompt_token_ids: list[int] | UnsetType = UNSET,
        has_usage: bool = False,
        is_last: bool = False,
    ) -> bytes:
        return encode_event(
            ChatCompletionChunk(
                id=self._head.id,
                created=self._head.created,
                model=self._head.model,
                choices=choices,
                usage=self._generation.usage() if has_usage or self._has_continuous_usage else UNSET,
                system_fingerprint=self._head.system_fingerprint if is_last else UNSET,
                prompt_token_ids=prompt_token_ids,
            )
        )
