"""POST /v1/chat/completions."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from quire_server.api.answering import answer_stream, answer_whole, prepare
from quire_server.api.bodies.lenient import LenientDecoder
from quire_server.api.openai.chunks import ChunkWriter, UsageOptions, build_usage
from quire_server.api.openai.conversation import content_texts, render_conversation
from quire_server.api.openai.head import AnswerHead, build_head
from quire_server.api.openai.logprobs import build_chat_logprobs, build_prompt_logprobs
from quire_server.api.openai.reading import read_request
from quire_server.api.openai.sampling import (
    ModelLimits,
    SamplingDefaults,
    build_generation_request,
    build_sampling_params,
    check_prompt,
    fit_max_tokens,
    refuse_unserved,
    truncate_prompt,
)
from quire_server.api.openai.schemas.answers import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ResponseMessage,
    Usage,
)
from quire_server.api.openai.schemas.requests import ChatCompletionRequest
from quire_server.api.state import get_frontend
from quire_server.frontend.frontend import Frontend
from quire_server.frontend.output_processor import CompletionDelta
from quire_server.generation.fan_out import Generation
from quire_server.generation.messages import (
    Message,
    MessageDelta,
    MessageParser,
    build_parsers,
    collect_messages,
)
from quire_server.generation.request import Prompt
from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.sampling_params import MAX_LOGPROBS

_decoder = LenientDecoder(ChatCompletionRequest)


async def create_chat_completion(http_request: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    frontend = get_frontend(http_request)
    request = await read_request(http_request, _decoder)
    head = build_head(http_request, frontend, request, prefix="chatcmpl")
    refuse_unserved(request, frontend.config.engine.scheduler.policy)
    prompt = await prepare(http_request, _build_prompt(frontend, request))
    shape = _Shape.of(request, prompt, frontend.config.response_role)
    generation_request = build_generation_request(request, head.id, [prompt])
    parsers = build_parsers(generation_request)
    generation = await Generation.start(frontend, generation_request)
    if not request.stream:
        return await answer_whole(http_request, generation, _read_whole(head, shape, generation, parsers))
    usage = UsageOptions.of(frontend.config, request)
    return answer_stream(generation, _ChatWriter(head, generation, usage, shape, parsers))


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
        tools=request.tools,
    )
    # The template writes the special tokens itself.
    token_ids = await frontend.encode(
        text,
        add_special_tokens=bool(request.add_special_tokens),
        is_cut=request.truncate_prompt_tokens is not None,
        param="messages",
    )
    token_ids = truncate_prompt(token_ids, request, limits)
    check_prompt(token_ids, limits, "messages")
    max_tokens = fit_max_tokens(request, limits, len(token_ids), default=defaults.max_tokens, param="messages")
    sampling_params = build_sampling_params(
        request,
        defaults,
        limits,
        max_tokens=max_tokens,
        logprobs=_num_logprobs(request),
        prompt_logprobs=request.prompt_logprobs,
    )
    return Prompt(token_ids=token_ids, sampling_params=sampling_params)


def _num_logprobs(request: ChatCompletionRequest) -> int | None:
    num_top = request.top_logprobs or 0
    if not 0 <= num_top <= MAX_LOGPROBS:
        raise InvalidRequestError(f"top_logprobs must be in [0, {MAX_LOGPROBS}], got {num_top}.", param="top_logprobs")
    if num_top and not request.logprobs:
        raise InvalidRequestError("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    return num_top if request.logprobs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What of an answer is shown, as one request asked for it."""

    prompt: Prompt
    role: str
    echo: str
    """What of the conversation the answer begins with."""
    has_logprobs: bool
    has_prompt_logprobs: bool
    has_ids: bool
    as_ids: bool
    """Whether tokens are named by their ids."""

    @classmethod
    def of(cls, request: ChatCompletionRequest, prompt: Prompt, response_role: str) -> "_Shape":
        last = request.messages[-1]
        is_new_turn = request.add_generation_prompt is not False and not request.continue_final_message
        role = response_role if is_new_turn else last.role
        is_echoed = request.echo and last.role == role
        texts = content_texts(last, f"messages[{len(request.messages) - 1}].content") if is_echoed else ()
        return cls(
            prompt=prompt,
            role=role,
            echo="\n".join(texts),
            has_logprobs=bool(request.logprobs),
            has_prompt_logprobs=request.prompt_logprobs is not None,
            has_ids=bool(request.return_token_ids),
            as_ids=bool(request.return_tokens_as_token_ids),
        )


async def _read_whole(
    head: AnswerHead, shape: _Shape, generation: Generation, parsers: Sequence[MessageParser]
) -> Callable[[], ChatCompletion]:
    messages = await collect_messages(generation, parsers)
    return functools.partial(_build_whole, head, shape, generation, messages)


def _build_whole(
    head: AnswerHead, shape: _Shape, generation: Generation, messages: Sequence[Message]
) -> ChatCompletion:
    prompt_logprobs = messages[0].answer.prompt_logprobs
    return ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[_build_choice(shape, index, message) for index, message in enumerate(messages)],
        usage=build_usage(generation.count_tokens()),
        system_fingerprint=head.system_fingerprint,
        prompt_logprobs=build_prompt_logprobs(prompt_logprobs) if shape.has_prompt_logprobs else None,
        prompt_token_ids=shape.prompt.token_ids if shape.has_ids else None,
    )


def _build_choice(shape: _Shape, index: int, message: Message) -> ChatChoice:
    answer = message.answer
    return ChatChoice(
        index=index,
        message=ResponseMessage(role=shape.role, content=shape.echo + message.content),
        logprobs=build_chat_logprobs(answer.logprobs, as_ids=shape.as_ids) if shape.has_logprobs else None,
        finish_reason=message.finish_reason,
        stop_reason=answer.stop_reason,
        token_ids=answer.token_ids if shape.has_ids else None,
    )


class _ChatWriter(ChunkWriter[ChatChunkChoice]):
    """Writes messages. Per choice the first chunk has the role, the last the finish reason."""

    def __init__(
        self,
        head: AnswerHead,
        generation: Generation,
        usage: UsageOptions,
        shape: _Shape,
        parsers: Sequence[MessageParser],
    ) -> None:
        super().__init__(_build_chunk, head, generation, usage)
        self._shape = shape
        self._parsers = parsers
        self._started: set[int] = set()

    def write(self, index: int, delta: CompletionDelta) -> bytes:
        first = b"" if index in self._started else self._start(index)
        message = self._parsers[index].feed(delta)
        finish_reason = message.finish_reason
        has_ids = self._shape.has_ids
        if not (message.fragments or finish_reason or delta.logprobs or (has_ids and delta.token_ids)):
            return first
        choice = ChatChunkChoice(
            index=index,
            delta=_build_delta(message),
            logprobs=build_chat_logprobs(delta.logprobs, as_ids=self._shape.as_ids) if delta.logprobs else None,
            finish_reason=finish_reason,
            stop_reason=UNSET if finish_reason is None else delta.stop_reason,
            token_ids=list(delta.token_ids) if has_ids else None,
        )
        return first + self._encode(index, choice, is_last=finish_reason is not None)

    def _start(self, index: int) -> bytes:
        self._started.add(index)
        shape = self._shape
        build_chunk = functools.partial(
            _build_chunk, prompt_token_ids=shape.prompt.token_ids if shape.has_ids else None, kv_transfer_params=UNSET
        )
        choice = ChatChunkChoice(index=index, delta=ChatDelta(role=shape.role, content=""))
        first = self._encode(index, choice, has_output=False, build_chunk=build_chunk)
        if shape.echo:
            echo = ChatChunkChoice(index=index, delta=ChatDelta(content=shape.echo))
            first += self._encode(index, echo, has_output=False)
        return first


def _build_delta(message: MessageDelta) -> ChatDelta:
    if not message.fragments and message.finish_reason is not None:
        return ChatDelta()
    content = ""
    for fragment in message.fragments:
        content += fragment.text
    return ChatDelta(content=content)


def _build_chunk(
    head: AnswerHead,
    choices: list[ChatChunkChoice],
    usage: Usage | UnsetType,
    fingerprint: str | UnsetType,
    prompt_token_ids: list[int] | UnsetType | None = UNSET,
    kv_transfer_params: UnsetType | None = None,
) -> ChatCompletionChunk:
    return ChatCompletionChunk(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=choices,
        usage=usage,
        system_fingerprint=fingerprint,
        prompt_token_ids=prompt_token_ids,
        kv_transfer_params=kv_transfer_params if choices else UNSET,
    )
