"""Offline batch inference: `LLM`, one process, vLLM's interface.

    llm = LLM("/models/smollm2")  # or a .gguf file, or a repository of the Hub
    llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].outputs[0].text

Owns the loop that the engine process has in a server. Results of a call are in the order of its prompts.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quire_contract.flags.table import Dtype
from quire_contract.phases import Readiness
from quire_server.download.model_source import parse_model_source, resolve_model
from quire_server.engine.border.messages import EngineProgress
from quire_server.engine.border.validation import validate_request
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.engine_process.startup import start_engine
from quire_server.frontend.output_processor import CompletionDelta, OutputProcessor, PositionLogprobs
from quire_server.offline.prompts import Prompt, PromptMapping, list_prompts, read_prompt
from quire_server.shared.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from quire_server.shared.errors import ContextLengthError, InvalidRequestError, QuireError
from quire_server.shared.field_values import read_integer
from quire_server.shared.sampling_params import SamplingParams, params_of_answer
from quire_server.tokens.generation_defaults import read_generation_defaults
from quire_server.tokens.tokenizer import Tokenizer, load_tokenizer

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability at a position."""

    logprob: float
    rank: int
    decoded_token: str


LogprobsAtPosition = dict[int, Logprob]


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsAtPosition] | None = None
    """One mapping per token, where they were asked for: the token itself and the most likely ones."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsAtPosition | None] | None = None
    """The first token has none: nothing comes before it."""
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One engine request, and where its answer goes."""

    request: EngineRequest
    result: RequestOutput
    completion: CompletionOutput


class LLM:
    """A model, loaded, that answers batches of prompts.

    Raises:
        StartupError: the checkpoint, the configuration or the memory does not allow it.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: Dtype = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        seed: int = 0,
        kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        max_num_seqs: int = 128,
        max_num_batched_tokens: int = 2048,
        chat_template: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        model_config = ModelConfig(
            model=model,
            path=resolve_model(parse_model_source(model, revision=revision), _ignore_readiness),
            served_model_names=(model,),
            tokenizer=Path(tokenizer) if tokenizer else None,
            dtype=dtype,
            max_model_len=max_model_len,
            seed=seed,
            chat_template=chat_template,
        )
        cache_config = CacheConfig(
            block_size=block_size,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            num_gpu_blocks_override=num_gpu_blocks_override,
            enable_prefix_caching=enable_prefix_caching,
        )
        scheduler_config = SchedulerConfig(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs)
        config = EngineConfig(
            model=model_config, cache=cache_config, scheduler=scheduler_config, num_threads=num_threads
        )
        self._start(config)

    @classmethod
    def from_config(cls, config: EngineConfig) -> "LLM":
        """Load what an engine process would load from the same configuration."""
        llm = cls.__new__(cls)
        llm._start(config)
        return llm

    def _start(self, config: EngineConfig) -> None:
        model = config.model
        self._tokenizer = load_tokenizer(model.path, model.tokenizer, chat_template=model.chat_template)
        is_auto = model.generation_config == "auto"
        self._generation_defaults = read_generation_defaults(model.path) if is_auto else {}
        engine = start_engine(config, on_progress=_ignore_progress)
        self.info = engine.info
        """Sizes of the engine, and the seconds that each stage of its start took."""
        self._core = engine.core
        self._request_numbers = itertools.count()

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where a call gives none: the model's own generation_config.json, if it has one."""
        return SamplingParams(**self._generation_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts: texts, token ids, or mappings with `prompt` or `prompt_token_ids`.

        `sampling_params` is one for all or one for each; so is `priority` (lower first, under the priority policy).

        Raises:
            InvalidRequestError: a prompt or a parameter cannot work; nothing was run.
        """
        listed = list_prompts(prompts)
        default = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = [_read_params(each) for each in _for_each("sampling_params", default, len(listed))]
        ranks = _for_each("priority", priority if priority is not None else 0, len(listed))
        priorities = [read_integer("priority", rank) for rank in ranks]
        jobs: list[_Job] = []
        results: list[RequestOutput] = []
        for prompt, each, rank in zip(listed, params, priorities, strict=True):
            text, token_ids = self._read_prompt(prompt)
            result = RequestOutput(
                request_id=str(next(self._request_numbers)), prompt=text, prompt_token_ids=token_ids, outputs=[]
            )
            results.append(result)
            jobs += self._build_jobs(result, each, rank)
        self._run(jobs, len(results), use_tqdm)
        return results

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered by the model's chat template (or the one given).

        Raises:
            InvalidRequestError: as `generate`, or the template refuses a conversation.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[PromptMapping] = []
        for conversation in conversations:
            text = self._tokenizer.apply_chat_template(
                conversation,  # type: ignore[arg-type]  # told apart by its first element
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            prompts.append({"prompt_token_ids": self._tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self._core.reset_prefix_cache()

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        read = read_prompt(prompt)
        if read.token_ids is not None:
            return read.text, read.token_ids
        assert read.text is not None  # one of the two
        return read.text, self._tokenizer.encode(read.text)

    def _build_jobs(self, result: RequestOutput, params: SamplingParams, priority: int) -> Iterator[_Job]:
        """One engine request per answer."""
        num_prompt_tokens = len(result.prompt_token_ids)
        room = self.info.max_model_len - num_prompt_tokens
        num_needed = 0 if params.max_tokens == 0 else 1  # none, where the prompt alone is to be scored
        if room < num_needed:
            raise ContextLengthError(
                f"The prompt has {num_prompt_tokens} tokens, and the model's context {self.info.max_model_len}, "
                f"of which the answer needs at least {num_needed}.",
                param="prompt",
            )
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        for index in range(params.n):
            of_answer = params_of_answer(params, index)
            request = EngineRequest(
                request_id=f"{result.request_id}-{index}",
                prompt_token_ids=result.prompt_token_ids,
                params=replace(of_answer, n=1, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens)),
                eos_token_ids=self._tokenizer.eos_token_ids,
                arrival_time=time.time(),
                priority=priority,
            )
            validate_request(request, self.info.vocab_size)
            completion = CompletionOutput(
                index=index,
                cumulative_logprob=None if params.logprobs is None else 0.0,
                logprobs=None if params.logprobs is None else [],
            )
            result.outputs.append(completion)
            if index == 0 and params.prompt_logprobs is not None:
                result.prompt_logprobs = [None]
            yield _Job(request=request, result=result, completion=completion)

    def _run(self, jobs: Sequence[_Job], num_prompts: int, use_tqdm: bool) -> None:
        processors = {job.request.request_id: OutputProcessor(self._tokenizer, job.request) for job in jobs}
        unfinished = {job.request.request_id: job for job in jobs}
        progress = tqdm(total=num_prompts, desc="Prompts", disable=not use_tqdm)
        try:
            for job in jobs:
                self._core.add_request(job.request)
            while self._core.has_unfinished:
                for output in self._core.step(time.time()):
                    finished = unfinished.get(output.request_id)
                    if finished is None:
                        continue  # its stop string came before
                    delta = processors[output.request_id].process(output)
                    _append(finished, delta)
                    if delta.finish_reason is not None:
                        del unfinished[output.request_id]
                        self._finish(finished, delta, has_engine_finished=output.finish_reason is not None)
                        progress.update(finished.result.finished)
        finally:
            progress.close()
            self._core.abort_requests(list(unfinished))
            while self._core.has_unfinished:
                self._core.step(time.time())

    def _finish(self, job: _Job, delta: CompletionDelta, *, has_engine_finished: bool) -> None:
        if delta.finish_reason is FinishReason.ERROR:
            raise delta.error or QuireError("The engine failed on this request.")
        if not has_engine_finished:
            self._core.abort_requests([job.request.request_id])
        job.result.finished = all(completion.finish_reason is not None for completion in job.result.outputs)


def _append(job: _Job, delta: CompletionDelta) -> None:
    """Add what a step brought to the result."""
    completion, result = job.completion, job.result
    completion.text += delta.text
    completion.token_ids += delta.token_ids
    completion.finish_reason = delta.finish_reason
    completion.stop_reason = delta.stop_reason
    result.num_cached_tokens = max(result.num_cached_tokens, delta.num_cached_tokens)
    if completion.logprobs is not None and completion.cumulative_logprob is not None:
        completion.logprobs += [_to_mapping(position) for position in delta.logprobs]
        completion.cumulative_logprob += sum(position.chosen.logprob for position in delta.logprobs)
    if result.prompt_logprobs is not None and completion.index == 0:
        result.prompt_logprobs += [_to_mapping(position) for position in delta.prompt_logprobs]


def _to_mapping(position: PositionLogprobs) -> LogprobsAtPosition:
    return {
        entry.token_id: Logprob(entry.logprob, entry.rank, entry.token) for entry in (position.chosen, *position.top)
    }


def _for_each(name: str, value: Any, count: int) -> list[Any]:
    """One value for all, or one for each."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(f"{name} has {len(value)} entries for {count} prompts.", param=name)
    return list(value)


def _read_params(value: Any) -> SamplingParams:
    if not isinstance(value, SamplingParams):
        message = f"sampling_params must be SamplingParams(...), one for all or one for each, got {value!r}."
        raise InvalidRequestError(message, param="sampling_params")
    return value


def _ignore_readiness(readiness: Readiness) -> None:
    """Offline, the log is enough."""


def _ignore_progress(progress: EngineProgress) -> None:
    """Offline, the log is enough."""
