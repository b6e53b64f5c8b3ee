"""POST /v1/completions."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from quire_server.api.answering import answer_stream, answer_whole, prepare
from quire_server.api.bodies.lenient import LenientDecoder
from quire_server.api.openai.chunks import ChunkWriter, UsageOptions, build_usage
from quire_server.api.openai.head import AnswerHead, build_head
from quire_server.api.openai.logprobs import TextOffsets, build_completion_logprobs, build_prompt_logprobs
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
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
    Usage,
)
from quire_server.api.openai.schemas.requests import CompletionRequest
from quire_server.api.state import get_frontend
from quire_server.frontend.frontend import Frontend
from quire_server.frontend.output_processor import CompletionDelta, LogprobEntry, PositionLogprobs, describe_token
from quire_server.generation.fan_out import Answer, Generation
from quire_server.generation.request import Prompt
from quire_server.shared.errors import InvalidRequestError
from quire_server.tokens.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16

_decoder = LenientDecoder(CompletionRequest)


async def create_completion(http_request: Request) -> Response:
    """Continue one or several texts, whole or as a stream."""
    frontend = get_frontend(http_request)
    request = await read_request(http_request, _decoder)
    head = build_head(http_request, frontend, request, prefix="cmpl")
    refuse_unserved(request, frontend.config.engine.scheduler.policy)
    sources = await prepare(http_request, _build_sources(frontend, request))
    generation_request = build_generation_request(request, head.id, [source.prompt for source in sources])
    choice_to_source = [sources[index] for index in generation_request.choice_to_prompt]
    choices = _ChoiceBuilder(request, choice_to_source, frontend.tokenizer)
    generation = await Generation.start(frontend, generation_request)
    if not request.stream:
        return await answer_whole(http_request, generation, _read_whole(head, choices, generation))
    usage = UsageOptions.of(frontend.config, request)
    return answer_stream(generation, _CompletionWriter(head, generation, usage, choices))


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Return the prompts that one field holds: a text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if len(kinds) > 1:
        raise InvalidRequestError("`prompt` must not mix texts and token ids.", param="prompt")
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    return cast("list[str | list[int]]", prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What choices continue."""

    prompt: Prompt
    echo: str
    """What `echo` puts before the answer."""


async def _build_sources(frontend: Frontend, request: CompletionRequest) -> list[_Source]:
    sources: list[_Source] = []
    for text in split_prompts(request.prompt):
        if sources:
            await asyncio.sleep(0)  # many short prompts are a long one
        sources.append(await _build_source(frontend, request, text))
    return sources


async def _build_source(frontend: Frontend, request: CompletionRequest, text: str | list[int]) -> _Source:
    limits = ModelLimits.of(frontend)
    defaults = SamplingDefaults(**frontend.generation_defaults)
    if isinstance(text, str):
        whole = await frontend.encode(
            text,
            add_special_tokens=request.add_special_tokens is not False,
            is_cut=request.truncate_prompt_tokens is not None,
        )
    else:
        whole = text
    token_ids = truncate_prompt(whole, request, limits)
    check_prompt(token_ids, limits, "prompt")
    max_tokens = fit_max_tokens(
        request,
        limits,
        len(token_ids),
        least=0 if request.echo else 1,  # 0 scores the prompt
        default=DEFAULT_MAX_TOKENS,
        param="prompt",
    )
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
    sampling_params = build_sampling_params(
        request,
        defaults,
        limits,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    echo = text if isinstance(text, str) and token_ids is whole else ""
    if request.echo and not echo:
        echo = await frontend.decode(token_ids, skip_special_tokens=sampling_params.skip_special_tokens)
    prompt = Prompt(token_ids=token_ids, sampling_params=sampling_params)
    return _Source(prompt=prompt, echo=echo if request.echo else "")


class _ChoiceBuilder:
    """Shapes whole completions, or consecutive pieces of them, as one request asked for them."""

    def __init__(self, request: CompletionRequest, choice_to_source: Sequence[_Source], tokenizer: Tokenizer) -> None:
        self._choice_to_source = choice_to_source
        self._tokenizer = tokenizer
        self._has_echo = bool(request.echo)
        self._has_logprobs = request.logprobs is not None
        self._has_prompt_logprobs = request.prompt_logprobs is not None
        self._as_ids = bool(request.return_tokens_as_token_ids)
        self.has_ids = bool(request.return_token_ids)
        self._index_to_offsets: dict[int, TextOffsets] = {}
        """Of the tokens shown so far; an index is here once its first piece was built."""

    def build_whole(self, index: int, answer: Answer) -> CompletionChoice:
        """Build a whole choice, which has the prompt's log-probabilities of its own besides those that echo shows."""
        piece = msgspec.structs.asdict(self.build(index, answer, answer.prompt_logprobs))
        scored = build_prompt_logprobs(answer.prompt_logprobs) if self._has_prompt_logprobs else None
        return CompletionChoice(**piece, prompt_logprobs=scored)

    def build(
        self, index: int, piece: Answer | CompletionDelta, prompt_logprobs: list[PositionLogprobs]
    ) -> CompletionChunkChoice:
        """Build the next piece of a choice; the first one carries what belongs to the prompt."""
        source = self._choice_to_source[index]
        prompt = source.prompt
        is_first = index not in self._index_to_offsets
        return CompletionChunkChoice(
            index=index,
            text=source.echo + piece.text if is_first else piece.text,
            logprobs=self._build_logprobs(index, prompt, piece.logprobs, prompt_logprobs, is_first),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=list(piece.token_ids) if self.has_ids else None,
            prompt_token_ids=prompt.token_ids if self.has_ids and is_first else None,
        )

    def _build_logprobs(
        self,
        index: int,
        prompt: Prompt,
        logprobs: Sequence[PositionLogprobs],
        prompt_logprobs: Sequence[PositionLogprobs],
        is_first: bool,
    ) -> CompletionLogprobs | None:
        offsets = self._index_to_offsets.setdefault(index, TextOffsets())
        if not self._has_logprobs:
            return None
        first_token: LogprobEntry | None = None
        if is_first and self._has_echo:
            logprobs = (*prompt_logprobs, *logprobs)
            first_token = describe_token(self._tokenizer, prompt.token_ids[0])
        built = build_completion_logprobs(logprobs, first_token=first_token, offsets=offsets, as_ids=self._as_ids)
        return built if built.tokens else None


async def _read_whole(head: AnswerHead, choices: _ChoiceBuilder, generation: Generation) -> Callable[[], Completion]:
    answers = await generation.collect()

    def build() -> Completion:
        return Completion(
            id=head.id,
            created=head.created,
            model=head.model,
            choices=[choices.build_whole(index, answer) for index, answer in enumerate(answers)],
            usage=build_usage(generation.count_tokens()),
            system_fingerprint=head.system_fingerprint,
        )

    return build


def _build_chunk(
    head: AnswerHead, choices: list[CompletionChunkChoice], usage: Usage | UnsetType, fingerprint: str | UnsetType
) -> CompletionChunk:
    return CompletionChunk(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=choices,
        usage=usage,
        system_fingerprint=fingerprint,
        kv_transfer_params=None if choices else UNSET,
    )


class _CompletionWriter(ChunkWriter[CompletionChunkChoice]):
    """Writes texts."""

    def __init__(self, head: AnswerHead, generation: Generation, usage: UsageOptions, choices: _ChoiceBuilder) -> None:
        super().__init__(_build_chunk, head, generation, usage)
        self._choices = choices
        self._held: dict[int, list[PositionLogprobs]] = {}  # a long prompt's arrive in parts, before the first token

    def write(self, index: int, delta: CompletionDelta) -> bytes:
        if delta.prompt_logprobs:
            self._held.setdefault(index, []).extend(delta.prompt_logprobs)
        is_last = delta.finish_reason is not None
        if not (delta.text or is_last or delta.logprobs or (self._choices.has_ids and delta.token_ids)):
            return b""
        choice = self._choices.build(index, delta, self._held.pop(index, []))
        return self._encode(index, choice, is_last=is_last)
