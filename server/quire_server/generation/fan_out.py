"""The completions of one request: sent to the engine together, read as one stream, ended together.

Owns how choices become engine requests. Today each choice is one of its own; when the engine branches a request itself,
only this module changes: whoever reads sees choices. Knows nothing of how answers are shown.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from quire_server.engine.border.validation import validate_sampling
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.frontend.frontend import CompletionStream, Frontend
from quire_server.frontend.output_processor import CompletionDelta, PositionLogprobs
from quire_server.generation.request import GenerationRequest, TokenCounts
from quire_server.shared.errors import InvalidRequestError, QuireError
from quire_server.shared.sampling_params import params_of_answer


@dataclass(slots=True, kw_only=True)
class Answer:
    """One whole completion, once every delta was added."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    _texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, delta: CompletionDelta) -> None:
        self._texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


class Generation:
    """All completions of one request. Whoever holds it closes it; closing ends what still runs in the engine."""

    def __init__(self, request: GenerationRequest) -> None:
        choice_to_prompt = request.choice_to_prompt
        self._prompts = request.prompts
        self._choices = [request.prompts[index] for index in choice_to_prompt]
        self._streams: list[CompletionStream] = []  # one for each choice
        self._num_output_tokens = [0] * len(self._choices)
        self._num_cached_tokens = [0] * len(self._choices)
        self._first_choices = [choice_to_prompt.index(index) for index in range(len(request.prompts))]

    @classmethod
    async def start(cls, frontend: Frontend, request: GenerationRequest) -> "Generation":
        """Send everything to the engine, or nothing.

        Raises:
            InvalidRequestError: there are more than the queue can ever hold, or the model cannot sample so.
            QuireError: what `Frontend.generate` raises when it does not take a request.
        """
        generation = cls(request)
        _check_fits(len(generation._choices), frontend)
        for prompt in request.prompts:
            validate_sampling(prompt.sampling_params, frontend.tokenizer.eos_token_ids, frontend.vocab_size)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(generation.aclose)
            for engine_request in _build_engine_requests(frontend, request):
                generation._streams.append(frontend.generate(engine_request))
            undo.pop_all()
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
        answers = [Answer() for _ in self._choices]
        async for index, delta in self.deltas():
            answers[index].add(delta)
        return answers

    def count_tokens(self) -> TokenCounts:
        """Count the tokens so far."""
        return TokenCounts(
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in self._prompts),
            num_cached_tokens=sum(self._num_cached_tokens[choice] for choice in self._first_choices),
            num_output_tokens=sum(self._num_output_tokens),
        )

    def count_tokens_of(self, choice: int, *, has_output: bool = True) -> TokenCounts:
        """Count one choice's tokens so far; without `has_output`, as they were before its first."""
        return TokenCounts(
            num_prompt_tokens=len(self._choices[choice].token_ids),
            num_cached_tokens=self._num_cached_tokens[choice],
            num_output_tokens=self._num_output_tokens[choice] if has_output else 0,
        )

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


def _check_fits(num_requests: int, frontend: Frontend) -> None:
    scheduler = frontend.config.engine.scheduler
    limit = scheduler.max_num_seqs + scheduler.max_num_queued_reqs
    if num_requests > limit:
        message = f"Prompts times answers must be at most {limit}, got {num_requests}."
        raise InvalidRequestError(message, param="prompt")


def _build_engine_requests(frontend: Frontend, request: GenerationRequest) -> list[EngineRequest]:
    """Build one engine request for each choice, in order; all of them, before the first is sent."""
    arrival_time = time.time()
    unique = uuid.uuid4().hex[:8]  # a client may use its id twice, the engine may not
    answers = [(prompt, answer) for prompt in request.prompts for answer in range(prompt.sampling_params.n)]
    return [
        EngineRequest(
            request_id=f"{request.request_id}-{unique}-{index}",
            prompt_token_ids=prompt.token_ids,
            params=params_of_answer(prompt.sampling_params, answer),
            eos_token_ids=frontend.tokenizer.eos_token_ids,
            arrival_time=arrival_time,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        for index, (prompt, answer) in enumerate(answers)
    ]
