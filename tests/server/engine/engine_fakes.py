"""A runner without a model, the naive loop that is its specification, and short builders.

The fake model is one that forgives nothing. What it keeps for a token is a number made from the token, its position and
the numbers of all tokens before it (or of those in the sliding window), read back through the block table. The next
token is made from the last number. A wrong slot, a stale block, a copy too late or a prefix that is not the same:
each changes every token that follows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kv_storage import small_kv_cache

from quire_server.engine.kv_cache_manager import NO_PREFIX, KVCacheManager, KVCacheParams
from quire_server.engine.output import EngineCoreOutput, TokenLogprobs
from quire_server.engine.request import EngineRequest, FinishReason, Request
from quire_server.engine.scheduler import Scheduler
from quire_server.engine.step import CompletedStep, NewRequestData, RunnerOutput, ScheduledRequest, SchedulerOutput
from quire_server.shared.config import SchedulerConfig
from quire_server.shared.errors import CodedError
from quire_server.shared.sampling_params import SamplingParams

VOCAB_SIZE = 11


def attend(token_id: int, position: int, context: Sequence[int], weights: int = 0) -> int:
    return hash((weights, token_id, position, *context))


def sample(value: int) -> int:
    return value % VOCAB_SIZE


def visible(position: int, sliding_window: int | None) -> range:
    """Positions before `position` that it sees."""
    start = 0 if sliding_window is None else max(0, position - sliding_window + 1)
    return range(start, position)


@dataclass
class _RunnerRequest:
    token_ids: list[int]
    num_prompt_tokens: int
    sampling_params: SamplingParams
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int | None = None
    """None: its first share says how many the cache has."""


@dataclass
class FakeRunner:
    is_asynchronous: ClassVar[bool] = False
    num_blocks: int
    block_size: int
    sliding_window: int | None = None
    weights: int = 0
    num_drafts: int = 0
    """Tokens that it guesses ahead; some of them wrong."""
    requests: dict[str, _RunnerRequest] = field(default_factory=dict)
    steps: list[SchedulerOutput] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kv: list[list[int | None]] = [[None] * self.block_size for _ in range(self.num_blocks)]

    def submit(self, scheduler_output: SchedulerOutput) -> CompletedStep:
        return CompletedStep(self.execute(scheduler_output))

    def execute(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        self.steps.append(scheduler_output)
        for request_id in scheduler_output.removed_request_ids:
            del self.requests[request_id]
        self._copy_blocks(scheduler_output)
        for new in scheduler_output.new_requests:
            self._add(new)
        named = [share.request_id for share in scheduler_output.scheduled]
        assert len(set(named)) == len(named)
        assert {new.request_id for new in scheduler_output.new_requests} <= set(named)
        for share in scheduler_output.scheduled:
            self.requests[share.request_id].block_table += share.new_block_ids
        return self._compute(scheduler_output.scheduled)

    def _copy_blocks(self, scheduler_output: SchedulerOutput) -> None:
        sources = {block_copy.src for block_copy in scheduler_output.block_copies}
        targets = [block_copy.dst for block_copy in scheduler_output.block_copies]
        assert len(set(targets)) == len(targets)
        assert not sources & set(targets), "copies run in any order"
        for src, dst in scheduler_output.block_copies:
            self.kv[dst] = list(self.kv[src])

    def _add(self, new: NewRequestData) -> None:
        assert new.request_id not in self.requests
        self.requests[new.request_id] = _RunnerRequest(
            token_ids=list(new.token_ids),
            num_prompt_tokens=new.num_prompt_tokens,
            sampling_params=new.sampling_params,
        )

    def _compute(self, scheduled: Sequence[ScheduledRequest]) -> RunnerOutput:
        sampled: dict[str, list[int]] = {}
        logprobs: dict[str, list[TokenLogprobs]] = {}
        prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        drafts: dict[str, list[int]] = {}
        for share in scheduled:
            request_id, request = share.request_id, self.requests[share.request_id]
            values = self._compute_share(request, share)
            if request.sampling_params.prompt_logprobs is not None:
                prompt_logprobs[request_id] = self._prompt_logprobs(request, share.first_position, values)
            if share.num_samples:
                tried = values[len(values) - share.num_samples :]
                sampled[request_id] = accept(tried, share.draft_token_ids)
                request.token_ids += sampled[request_id]
                request.num_computed_tokens = len(request.token_ids) - 1
                if request.sampling_params.logprobs is not None:
                    pairs = zip(sampled[request_id], tried, strict=False)
                    logprobs[request_id] = [token_logprobs(token_id, value) for token_id, value in pairs]
                drafts[request_id] = self._guess(request)
        return RunnerOutput(
            sampled_token_ids=sampled, logprobs=logprobs, prompt_logprobs=prompt_logprobs, draft_token_ids=drafts
        )

    def _compute_share(self, request: _RunnerRequest, share: ScheduledRequest) -> list[int]:
        """Return what was kept for each of the share's tokens."""
        assert share.num_tokens > 0
        assert request.num_computed_tokens in (None, share.first_position), "no token twice, and none left out"
        known = [*request.token_ids, *share.draft_token_ids]
        end = share.first_position + share.num_tokens
        if share.num_samples:
            assert end == len(known)
            assert share.num_samples == 1 + len(share.draft_token_ids)
        else:
            assert end < len(known)
            assert not share.draft_token_ids
        request.num_computed_tokens = end
        return [self._compute_next(request, known[position], position) for position in range(share.first_position, end)]

    def _compute_next(self, request: _RunnerRequest, token_id: int, position: int) -> int:
        context = [self._read(request, p) for p in visible(position, self.sliding_window)]
        value = attend(token_id, position, context, self.weights)
        block_id = request.block_table[position // self.block_size]
        assert block_id != 0, "the null block is not written"
        self.kv[block_id][position % self.block_size] = value
        return value

    def _guess(self, request: _RunnerRequest) -> list[int]:
        """Guess tokens from the last ones: what the model would say, but for every third."""
        token_ids, guesses = list(request.token_ids), []
        first_visible = visible(len(token_ids) - 1, self.sliding_window)
        values = {position: self._read(request, position) for position in first_visible} if self.num_drafts else {}
        for _ in range(self.num_drafts):
            position = len(token_ids) - 1
            context = [values[p] for p in visible(position, self.sliding_window)]
            values[position] = attend(token_ids[-1], position, context, self.weights)
            token_ids.append((sample(values[position]) + (values[position] % 3 == 0)) % VOCAB_SIZE)
            guesses.append(token_ids[-1])
        return guesses

    def _read(self, request: _RunnerRequest, position: int) -> int:
        block_id = request.block_table[position // self.block_size]
        assert block_id != 0, "the null block is not read"
        value = self.kv[block_id][position % self.block_size]
        assert value is not None, "read before written"
        return value

    def _prompt_logprobs(self, request: _RunnerRequest, start: int, values: list[int]) -> list[TokenLogprobs]:
        last = request.num_prompt_tokens - 1
        return [token_logprobs(request.token_ids[p + 1], value) for p, value in enumerate(values, start) if p < last]


def accept(values: Sequence[int], draft_token_ids: Sequence[int]) -> list[int]:
    """Sample from each value as long as the draft before it was right."""
    accepted = [sample(values[0])]
    for draft, value in zip(draft_token_ids, values[1:], strict=True):
        if draft != accepted[-1]:
            break
        accepted.append(sample(value))
    return accepted


def token_logprobs(token_id: int, value: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(value % 1000), 1)


@dataclass
class Answer:
    """All that a client has heard of a request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: CodedError | None = None

    def add(self, output: EngineCoreOutput) -> None:
        assert self.finish_reason is None, "nothing follows the end"
        self.token_ids += output.new_token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.finish_reason, self.stop_reason, self.error = output.finish_reason, output.stop_reason, output.error


def naive_answer(
    request: EngineRequest, *, max_model_len: int = 10**6, sliding_window: int | None = None, weights: int = 0
) -> Answer:
    """One request, one token at a time, no cache to get wrong."""
    params = request.sampling_params
    answer = Answer()
    token_ids = list(request.prompt_token_ids)
    values: list[int] = []
    while True:
        for position in range(len(values), len(token_ids)):
            context = [values[p] for p in visible(position, sliding_window)]
            values.append(attend(token_ids[position], position, context, weights))
        if params.prompt_logprobs is not None and not answer.prompt_logprobs:
            pairs = zip(request.prompt_token_ids[1:], values, strict=False)
            answer.prompt_logprobs = [token_logprobs(token_id, value) for token_id, value in pairs]
        if params.max_tokens == 0:
            answer.finish_reason = FinishReason.LENGTH
            return answer
        token_id = sample(values[-1])
        token_ids.append(token_id)
        answer.token_ids.append(token_id)
        if params.logprobs is not None:
            answer.logprobs.append(token_logprobs(token_id, values[-1]))
        if len(answer.token_ids) >= params.min_tokens:
            if token_id in request.eos_token_ids and not params.ignore_eos:
                answer.finish_reason = FinishReason.STOP
                return answer
            if token_id in params.stop_token_ids:
                answer.finish_reason, answer.stop_reason = FinishReason.STOP, token_id
                return answer
        if len(answer.token_ids) == params.max_tokens or len(token_ids) == max_model_len:
            answer.finish_reason = FinishReason.LENGTH
            return answer


def make_engine_request(
    request_id: str = "a",
    prompt: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    eos_token_ids: tuple[int, ...] = (),
    arrival_time: float = 0.0,
    priority: int = 0,
    cache_salt: str | None = None,
    **params: object,
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(**params),  # type: ignore[arg-type]
        eos_token_ids=eos_token_ids,
        arrival_time=arrival_time,
        priority=priority,
        cache_salt=cache_salt,
    )


def make_request(request_id: str = "a", prompt: Sequence[int] = (1, 2, 3, 4, 5), **kwargs: object) -> Request:
    return Request.from_engine_request(make_engine_request(request_id, prompt, **kwargs))  # type: ignore[arg-type]


def make_manager(
    num_blocks: int = 11, block_size: int = 4, sliding_window: int | None = None, **kwargs: object
) -> KVCacheManager:
    """`num_blocks` counts the null block."""
    params = {"max_num_batched_tokens": 64, "kv_cache": small_kv_cache(sliding_window), **kwargs}
    return KVCacheManager(KVCacheParams(num_blocks=num_blocks, block_size=block_size, **params))  # type: ignore[arg-type]


def compute(manager: KVCacheManager, request: Request, num_tokens: int | None = None) -> Sequence[int]:
    """Admit or continue a request as the scheduler does; all of its tokens unless told otherwise."""
    prefix = manager.find_cached_prefix(request) if request.num_computed_tokens == 0 else NO_PREFIX
    computed = request.num_computed_tokens + prefix.num_tokens
    num_tokens = request.num_tokens - computed if num_tokens is None else num_tokens
    block_ids = manager.allocate(request, num_tokens, prefix)
    assert block_ids is not None
    request.num_computed_tokens = computed + num_tokens
    manager.cache_full_blocks(request)
    manager.check_integrity()
    return block_ids


def append(request: Request, *token_ids: int) -> None:
    request.token_ids.extend(token_ids)


def make_scheduler(
    num_blocks: int = 101,
    block_size: int = 4,
    max_model_len: int = 1000,
    sliding_window: int | None = None,
    **kwargs: object,
) -> Scheduler:
    config = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **kwargs})  # type: ignore[arg-type]
    manager = make_manager(
        num_blocks,
        block_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        sliding_window=sliding_window,
    )
    return Scheduler(config, manager, max_model_len)


class SchedulerDriver:
    """Steps a scheduler by hand. A request that samples is given 7, or what `tokens` says."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def add(
        self, request_id: str, prompt: Sequence[int] | int = 5, *, blockers: Sequence[str] = (), **kwargs: Any
    ) -> None:
        prompt = [hash((request_id, p)) % 1000 for p in range(prompt)] if isinstance(prompt, int) else prompt
        self.scheduler.add_request(make_engine_request(request_id, prompt, **kwargs), blockers)

    def schedule(self, now: float = 0.0) -> SchedulerOutput:
        return self.scheduler.schedule(now)

    def update(
        self,
        scheduler_output: SchedulerOutput,
        tokens: Mapping[str, Sequence[int]] = {},
        **kwargs: Mapping[str, Sequence[Any]],
    ) -> dict[str, EngineCoreOutput]:
        sampled = {
            share.request_id: tokens.get(share.request_id, [7])
            for share in scheduler_output.scheduled
            if share.num_samples
        }
        outputs = self.scheduler.update_from_output(scheduler_output, RunnerOutput(sampled_token_ids=sampled, **kwargs))
        self.scheduler.check_integrity()
        return {output.request_id: output for output in outputs}

    def step(self, tokens: Mapping[str, Sequence[int]] = {}) -> tuple[SchedulerOutput, dict[str, EngineCoreOutput]]:
        scheduler_output = self.schedule()
        return scheduler_output, self.update(scheduler_output, tokens)

    def scheduled(self, num_steps: int) -> list[dict[str, int]]:
        return [dict(self.step()[0].num_scheduled_tokens) for _ in range(num_steps)]


def make_full(**kwargs: object) -> SchedulerDriver:
    """Two requests of two blocks each that have filled a cache of four: the next step preempts one."""
    driver = SchedulerDriver(make_scheduler(num_blocks=5, block_size=4, **kwargs))  # type: ignore[arg-type]
    driver.add("a", 7, priority=1, arrival_time=1.0, max_tokens=9)
    driver.add("b", 7, priority=0, arrival_time=2.0, max_tokens=9)
    driver.step()
    driver.step()
    return driver
