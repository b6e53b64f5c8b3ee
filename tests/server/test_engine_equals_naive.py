"""The whole engine against a loop that anybody can check: one request at a time, no cache, by transformers.

Batched, chunked, preempted, prefix-cached, forked and replayed, over block sizes, budgets and caches small enough to
force every path, on every backend that this machine has; the answers must be the same token for token. Weights are wide
enough that no two logits are near, so that float32 rounding cannot decide.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_storage import build_storage, small_kv_cache
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from quire_kernels._cpu import native
from quire_kernels.build import library_path
from quire_server.engine.core import EngineCore, EngineCoreConfig
from quire_server.engine.kv_cache_manager import KVCacheManager, KVCacheParams
from quire_server.engine.output import SchedulerStats
from quire_server.engine.request import EngineRequest, FinishReason, Request
from quire_server.engine.step import NewRequestData, ScheduledRequest, SchedulerOutput
from quire_server.models.decoder import DecoderModel
from quire_server.models.loader import load_model
from quire_server.runner.model_runner import ModelRunner, RunnerConfig
from quire_server.runner.recorded_path import RecordedPath
from quire_server.shared.config import SchedulerConfig
from quire_server.shared.sampling_params import SamplingParams
from quire_server.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")
VOCAB_SIZE = 97
MAX_MODEL_LEN = 96
SLIDING_WINDOW = 20
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
}
BACKENDS = [native.NO_ISA, *(isa for isa in native.supported_isas() if library_path(isa).exists())]


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """A model, and how it answers without an engine."""

    path: Path
    model: PreTrainedModel
    sliding_window: int | None
    answers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy tokens, each from a full recomputation of everything before it."""
        known = self.answers.setdefault(tuple(prompt), [])
        while len(known) < num_tokens:
            logits = self.model(torch.tensor([[*prompt, *known]]), use_cache=False).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            assert best - second > 1e-3, "a near tie proves nothing; choose other weights"
            known.append(int(logits.argmax()))
        return known[:num_tokens]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    built = {}
    for name, config, kind, window in (
        ("llama", LlamaConfig(**SIZES), LlamaForCausalLM, None),
        ("mistral", MistralConfig(**SIZES, sliding_window=SLIDING_WINDOW), MistralForCausalLM, SLIDING_WINDOW),
    ):
        torch.manual_seed(11)
        config._attn_implementation = "eager"
        model = kind(config).eval()
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        built[name] = Oracle(path=path, model=model, sliding_window=window)
    return built


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


Load = Callable[[str], DecoderModel]


@pytest.fixture(scope="module")
def load(backend: str, oracles: dict[str, Oracle]) -> Load:
    """Load a model once per backend; packed weights belong to one."""
    loaded: dict[str, DecoderModel] = {}

    def load_once(name: str) -> DecoderModel:
        if name not in loaded:
            checkpoint = open_checkpoint(oracles[name].path)
            loaded[name] = load_model(checkpoint, dtype=torch.float32, device=CPU, on_progress=lambda _share: None)
        return loaded[name]

    return load_once


def build_runner(model: DecoderModel, *, num_blocks: int, block_size: int, max_num_seqs: int = 16) -> ModelRunner:
    storage = build_storage(model.spec, num_blocks=num_blocks, block_size=block_size)
    for cache in storage.layers:  # a slot that was never written must never be read
        cache.key.fill_(torch.nan)
        cache.value.fill_(torch.nan)
    config = RunnerConfig(max_num_seqs=max_num_seqs, max_model_len=MAX_MODEL_LEN, block_size=block_size, seed=0)
    return ModelRunner(model, storage, config, device=CPU)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine, made to be short of everything."""

    block_size: int
    num_cached_tokens: int
    num_cached_tokens_with_window: int
    """With a sliding window a sequence holds less, so the cache is smaller."""
    budget: int
    max_num_seqs: int = 16
    enable_prefix_caching: bool = True
    policy: str = "fcfs"

    @property
    def is_short(self) -> bool:
        return self.num_cached_tokens < 200

    def build_core(self, model: DecoderModel, sliding_window: int | None, *, max_steps_ahead: int = 0) -> EngineCore:
        num_tokens = self.num_cached_tokens if sliding_window is None else self.num_cached_tokens_with_window
        num_blocks = num_tokens // self.block_size + 1
        config = EngineCoreConfig(
            scheduler=SchedulerConfig(
                max_num_batched_tokens=self.budget,
                max_num_seqs=self.max_num_seqs,
                policy="priority" if self.policy == "priority" else "fcfs",
            ),
            max_model_len=MAX_MODEL_LEN,
            num_blocks=num_blocks,
            block_size=self.block_size,
            kv_cache=small_kv_cache(sliding_window),
            enable_prefix_caching=self.enable_prefix_caching,
            max_steps_ahead=max_steps_ahead,
        )
        runner = build_runner(model, num_blocks=num_blocks, block_size=self.block_size, max_num_seqs=self.max_num_seqs)
        return EngineCore(config, runner)


def case(block_size: int, num_cached_tokens: int, num_cached_tokens_with_window: int, budget: int, **more: Any) -> Case:
    return Case(
        block_size=block_size,
        num_cached_tokens=num_cached_tokens,
        num_cached_tokens_with_window=num_cached_tokens_with_window,
        budget=budget,
        **more,
    )


ROOMY = case(16, 1600, 1600, 512)
CASES = [
    case(1, 110, 70, 16),
    case(2, 110, 70, 17),
    case(4, 112, 96, 64),
    case(4, 112, 64, 16, policy="priority"),
    case(16, 112, 80, 33),
    case(2, 100, 60, 16, enable_prefix_caching=False),
    case(4, 1000, 1000, 3, max_num_seqs=3),
    ROOMY,
]


def build_prompts() -> list[list[int]]:
    """Some alone, some that share a beginning, some twice."""
    rng = random.Random(5)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(24)]
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 2, 5, 16, 33, 41)]
    prompts += [shared + [rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (0, 1, 7, 8)]
    return [*prompts, prompts[3], prompts[6], prompts[9], prompts[5]]


PROMPTS = build_prompts()
NUM_OUTPUT_TOKENS = [12, 20, 9, 24, 17, 22, 16, 11, 20, 14, 24, 6, 20, 10]


def requests_of(params: Callable[[int], SamplingParams]) -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id=f"r{index}",
            prompt_token_ids=prompt,
            params=params(index),
            arrival_time=float(index),
            priority=index % 3,
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def greedy(index: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS[index])


def sampled(index: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.5,
        top_p=0.95,
        top_k=40,
        seed=index if index % 2 else None,
        repetition_penalty=1.3 if index % 3 == 0 else 1.0,
        frequency_penalty=0.5 if index % 4 == 0 else 0.0,
        max_tokens=NUM_OUTPUT_TOKENS[index],
    )


def run(core: EngineCore, requests: Sequence[EngineRequest]) -> tuple[dict[str, list[int]], SchedulerStats]:
    """Add three requests per step, then step until all are done."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    finished: set[str] = set()
    todo = list(requests)
    while todo or core.has_unfinished:
        for request in todo[:3]:
            core.add_request(request)
        todo = todo[3:]
        for output in core.step(now=0.0):
            assert output.error is None
            assert output.request_id not in finished
            tokens[output.request_id] += output.new_token_ids
            if output.finish_reason is not None:
                assert output.finish_reason is FinishReason.LENGTH
                finished.add(output.request_id)
        core.check_integrity()
    assert finished == tokens.keys()
    return tokens, core.stats()


def num_replays(core: EngineCore) -> int:
    runner = core._runner
    assert isinstance(runner, ModelRunner)
    (recorded,) = [path for path in runner._paths if isinstance(path, RecordedPath)]
    return recorded.num_replays


@pytest.mark.parametrize("max_steps_ahead", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_engine_says_what_the_naive_loop_says(
    name: str, case: Case, max_steps_ahead: int, backend: str, load: Load, oracles: dict[str, Oracle]
) -> None:
    oracle = oracles[name]
    core = case.build_core(load(name), oracle.sliding_window, max_steps_ahead=max_steps_ahead)
    tokens, stats = run(core, requests_of(greedy))
    expected = {f"r{index}": oracle.answer(prompt, NUM_OUTPUT_TOKENS[index]) for index, prompt in enumerate(PROMPTS)}
    assert tokens == expected
    assert (stats.num_preemptions > 0) == case.is_short
    assert (stats.prefix_cache_hits > 0) == case.enable_prefix_caching
    assert (num_replays(core) > 0) == (backend != native.NO_ISA)
    if case.budget < 41:
        assert stats.num_steps > max(NUM_OUTPUT_TOKENS)  # prompts went in pieces


@pytest.mark.parametrize("max_steps_ahead", [0, 1, 2])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4]], ids=repr)
def test_sampling_survives_preemption_and_company(case: Case, max_steps_ahead: int, load: Load) -> None:
    """The same requests, each alone in a roomy engine and all together in one that is short of everything."""
    model = load("llama")
    requests = requests_of(sampled)
    tokens, stats = run(case.build_core(model, None, max_steps_ahead=max_steps_ahead), requests)
    assert stats.num_preemptions > 0
    alone: dict[str, list[int]] = {}
    for request in requests:
        alone |= run(ROOMY.build_core(model, None), [request])[0]
    assert tokens == alone


@pytest.mark.parametrize("block_size", [2, 4, 16])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_forks_share_what_they_can_and_copy_what_they_write(
    name: str, block_size: int, load: Load, oracles: dict[str, Oracle]
) -> None:
    """A request is forked in mid-answer into three that go separate ways; all must go on as if they were alone."""
    oracle = oracles[name]
    fork = ForkedRun(load(name), oracle.sliding_window, block_size)
    prompt = PROMPTS[8]
    assert len(prompt) % 16 != 0
    parent = fork.admit(prompt)
    for _ in range(6):
        fork.step([parent])
    children = [fork.fork(parent, f"child {index}", token_id) for index, token_id in enumerate((3, 50, 96))]
    family = [parent, *children]
    beginnings = [list(request.token_ids) for request in family]
    for _ in range(9):
        fork.step(family)
    assert fork.num_block_copies == (len(children) if fork.was_partial else 0)
    for request, beginning in zip(family, beginnings, strict=True):
        assert request.token_ids[len(beginning) :] == oracle.answer(beginning, 9)
    for request in family:
        fork.manager.free(request)
    fork.manager.check_integrity()


class ForkedRun:
    """The least scheduler: no budget, no queue; blocks by the manager, block copies by the runner."""

    def __init__(self, model: DecoderModel, sliding_window: int | None, block_size: int) -> None:
        num_blocks = 400 // block_size
        self.manager = KVCacheManager(
            KVCacheParams(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_batched_tokens=512,
                kv_cache=small_kv_cache(sliding_window),
            )
        )
        self.num_block_copies = 0
        self.was_partial = False
        self._block_size = block_size
        self._runner = build_runner(model, num_blocks=num_blocks, block_size=block_size)
        self._known: set[str] = set()

    def admit(self, prompt: Sequence[int]) -> Request:
        return Request.from_engine_request(
            EngineRequest(
                request_id="parent",
                prompt_token_ids=list(prompt),
                params=SamplingParams(temperature=0.0, max_tokens=50),
            )
        )

    def fork(self, parent: Request, request_id: str, token_id: int) -> Request:
        """A copy of the request whose last token, not computed yet, is another one."""
        child = copy.deepcopy(parent)
        child.request_id = request_id
        child.token_ids[-1] = token_id
        self.was_partial = parent.num_computed_tokens % self._block_size != 0
        self.manager.fork(parent, child)
        return child

    def step(self, requests: Sequence[Request]) -> None:
        new, shares = [], []
        for request in requests:
            count = request.num_tokens - request.num_computed_tokens
            block_ids = self.manager.allocate(request, count)
            assert block_ids is not None
            if request.request_id not in self._known:
                self._known.add(request.request_id)
                new.append(describe(request))
                block_ids = self.manager.block_ids(request)
            shares.append(
                ScheduledRequest(
                    request_id=request.request_id,
                    epoch=0,
                    first_position=request.num_computed_tokens,
                    num_tokens=count,
                    num_samples=1,
                    new_block_ids=block_ids,
                )
            )
        copies = self.manager.take_block_copies()
        self.num_block_copies += len(copies)
        step = SchedulerOutput(scheduled=shares, new_requests=new, block_copies=copies)
        output = self._runner.submit(step).result()
        self.manager.finish_block_copies(copies)
        for request, share in zip(requests, shares, strict=True):
            request.num_computed_tokens += share.num_tokens
            self.manager.cache_full_blocks(request)
            request.token_ids += output.sampled_token_ids[request.request_id]
        self.manager.check_integrity()


def describe(request: Request) -> NewRequestData:
    return NewRequestData(
        request_id=request.request_id,
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        sampling_params=request.sampling_params,
        eos_token_ids=(),
    )
