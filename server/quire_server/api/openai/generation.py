"""The completions of one HTTP request: sent to the engine together, read as one stream, ended together.

`n` answers for each of several prompts are that many engine requests; the choice index is prompt index × n + answer.
Knows no response shapes: `chat` and `completions` turn deltas into theirs.
"""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire_server.api.errors import CLIENT_CLOSED_REQUEST, build_error, json_response
from quire_server.api.openai.models import resolve_model
from quire_server.api.openai.responses import PromptTokensDetails, Usage
from quire_server.api.openai.schemas import GenerationFields
from quire_server.api.request_id import REQUEST_ID_HEADER
from quire_server.api.sse import (
    DONE,
    ClientDisconnectedError,
    encode_event,
    run_until_disconnect,
)
from quire_server.api.version import system_fingerprint
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.errors import InvalidRequestError, QuireError
from quire_server.frontend import CompletionStream, Frontend
from quire_server.output_processor import CompletionDelta, PositionLogprobs
from quire_server.sampling_params import SamplingParams

MAX_REQUEST_ID_LENGTH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, ready for the engine."""

    token_ids: list[int]
    sampling_params: SamplingParams
    """With `max_tokens` 0: only the prompt's own log-probabilities are wanted."""
    echo: str = ""
    """What `echo` puts before the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHead:
    """What the answer and every chunk of it repeat."""

    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(slots=True, kw_only=True)
class Answer:
    """One whole completion."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Generation:
    """All completions of one request. Whoever holds it closes it; closing ends what still runs in the engine."""

    def __init__(self, prompts: Sequence[Prompt], n: int) -> None:
        self._prompts = prompts
        self._n = n
        self._streams: list[CompletionStream] = []
        self._num_output_tokens = [0] * (len(prompts) * n)
        self._num_cached_tokens = [0] * (len(prompts) * n)

    @classmethod
    async def start(
        cls, frontend: Frontend, request: GenerationFields, prompts: Sequence[Prompt], request_id: str
    ) -> "Generation":
        """Send everything to the engine, or nothing.

        Raises:
            InvalidRequestError: there are more than the queue can ever hold.
            QuireError: what `EngineClient.generate` raises when it does not take a request.
        """
        generation = cls(prompts, request.n or 1)
        _check_fits(len(prompts) * generation._n, frontend)
        arrival_time = time.time()
        unique = uuid.uuid4().hex[:8]  # a client may use its id twice, the engine may not
        try:
            for index in range(len(prompts) * generation._n):
                prompt = prompts[index // generation._n]
                engine_request = EngineRequest(
                    request_id=f"{request_id}-{unique}-{index}",
                    prompt_token_ids=prompt.token_ids,
                    params=_params_of_answer(prompt.sampling_params, index % generation._n),
                    eos_token_ids=frontend.tokenizer.eos_token_ids,
                    arrival_time=arrival_time,
                    priority=request.priority or 0,
                    cache_salt=request.cache_salt,
                )
                generation._streams.append(frontend.generate(engine_request))
        except QuireError:
            await generation.aclose()
            raise
        return generation

    async def deltas(self) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
        """Yield (choice index, delta) in order of arrival.

        Raises:
            QuireError: a completion ended without its answer.
        """
        source = self._read_one() if len(self._streams) == 1 else self._read_many()
        async with contextlib.aclosing(source):
            async for index, delta in source:
                if delta.finish_reason is FinishReason.ERROR:
                    raise delta.error or QuireError("The engine failed on this request.")
                self._num_output_tokens[index] = delta.num_output_tokens
                self._num_cached_tokens[index] = max(self._num_cached_tokens[index], delta.num_cached_tokens)
                yield index, delta

    async def collect(self) -> list[Answer]:
        """Read every completion to its end."""
        answers = [Answer() for _ in self._streams]
        texts: list[list[str]] = [[] for _ in self._streams]
        async for index, delta in self.deltas():
            answer = answers[index]
            texts[index].append(delta.text)
            answer.token_ids += delta.token_ids
            answer.logprobs += delta.logprobs
            answer.prompt_logprobs += delta.prompt_logprobs
            if delta.finish_reason is not None:
                answer.finish_reason = delta.finish_reason
                answer.stop_reason = delta.stop_reason
        for answer, parts in zip(answers, texts, strict=True):
            answer.text = "".join(parts)
        return answers

    def usage(self) -> Usage:
        """Count the tokens so far. A prompt counts once, however many answers it has."""
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self._prompts)
        num_output_tokens = sum(self._num_output_tokens)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
            completion_tokens=num_output_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached_tokens[:: self._n])),
        )

    def prompt_of(self, index: int) -> Prompt:
        """Return the prompt that a choice answers."""
        return self._prompts[index // self._n]

    async def aclose(self) -> None:
        """End whatever still runs. Does nothing the second time."""
        for stream in self._streams:
            await stream.aclose()

    async def _read_one(self) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
        async for delta in self._streams[0]:
            yield 0, delta

    async def _read_many(self) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
        task_to_index = {self._read_next(index): index for index in range(len(self._streams))}
        try:
            while task_to_index:
                done, _ = await asyncio.wait(task_to_index, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=task_to_index.__getitem__):
                    index = task_to_index.pop(task)
                    delta = task.result()
                    if delta is not None:
                        task_to_index[self._read_next(index)] = index
                        yield index, delta
        finally:
            for task in task_to_index:
                task.cancel()
            await asyncio.gather(*task_to_index, return_exceptions=True)

    def _read_next(self, index: int) -> "asyncio.Task[CompletionDelta | None]":
        async def read() -> CompletionDelta | None:
            return await anext(self._streams[index], None)

        return asyncio.create_task(read())


async def stream_events(
    generation: Generation, build_chunk: Callable[[int, CompletionDelta], bytes], build_last: Callable[[], bytes]
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream, then [DONE]; an error after the start becomes an event."""
    try:
        async with contextlib.aclosing(generation.deltas()) as deltas:
            async for index, delta in deltas:
                if chunk := build_chunk(index, delta):
                    yield chunk
        if last := build_last():
            yield last
    except QuireError as error:
        yield encode_event(build_error(error))
    yield DONE


async def answer_whole(
    http_request: Request, generation: Generation, build: Callable[[list[Answer]], msgspec.Struct]
) -> Response:
    """Answer when every completion is there; nothing goes on after a client that leaves."""
    try:
        answers = await run_until_disconnect(http_request.receive, generation.collect())
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await generation.aclose()
    return json_response(build(answers))


def build_head(
    http_request: Request, frontend: Frontend, request: GenerationFields, *, prefix: Literal["chatcmpl", "cmpl"]
) -> ReplyHead:
    """Name the answer: after the client's own id for the request, where it gave one.

    Raises:
        ModelNotFoundError: the model is not served here.
        InvalidRequestError: the id is too long.
    """
    request_id = http_request.headers.get(REQUEST_ID_HEADER) or request.request_id or uuid.uuid4().hex
    if len(request_id) > MAX_REQUEST_ID_LENGTH:
        message = f"The request id must have at most {MAX_REQUEST_ID_LENGTH} characters."
        raise InvalidRequestError(message, param="request_id")
    return ReplyHead(
        id=f"{prefix}-{request_id}",
        created=int(time.time()),
        model=resolve_model(frontend, request.model),
        system_fingerprint=system_fingerprint(frontend),
    )


def wants_usage(frontend: Frontend, request: GenerationFields) -> tuple[bool, bool]:
    """Return whether a stream ends with the usage, and whether every chunk has it."""
    options = request.stream_options
    is_last = frontend.config.enable_force_include_usage or bool(options and options.include_usage)
    return is_last, is_last and bool(options and options.continuous_usage_stats)


def _check_fits(num_requests: int, frontend: Frontend) -> None:
    scheduler = frontend.config.engine.scheduler
    limit = scheduler.max_num_seqs + scheduler.max_num_queued_reqs
    if num_requests > limit:
        message = f"Prompts times answers must be at most {limit}, got {num_requests}."
        raise InvalidRequestError(message, param="prompt")


def _params_of_answer(params: SamplingParams, answer: int) -> SamplingParams:
    if answer and params.seed is not None:
        seed = (params.seed + answer + 2**63) % 2**64 - 2**63  # stays in 64 bits
        return dataclasses.replace(params, seed=seed)
    return params
