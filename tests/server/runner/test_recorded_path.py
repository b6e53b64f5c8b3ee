"""Replayed decode steps against the same engine without recordings, bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kv_storage import build_storage, small_kv_cache

from quire_kernels._cpu import native
from quire_kernels._cpu.variants import library_path
from quire_server.engine.core import EngineCore, EngineCoreConfig
from quire_server.engine.request import EngineRequest
from quire_server.models.loader import load_model
from quire_server.models.modules import rope_table
from quire_server.runner.model_runner import ModelRunner, RunnerConfig
from quire_server.runner.recorded_path import RecordedPath
from quire_server.shared.config import SchedulerConfig
from quire_server.shared.sampling_params import SamplingParams
from quire_server.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")
BLOCK_SIZE = 4
BACKENDS = [isa for isa in native.supported_isas() if library_path(isa).exists()]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What an engine made, and how."""

    tokens: dict[str, list[int]]
    logprobs: dict[str, list[float]]
    num_replays: int


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


def run(checkpoint: Path, dtype: torch.dtype, *, enable_recording: bool, **params: object) -> Made:
    """Requests of different lengths, so that the batch shrinks step by step, and one that comes late."""
    model = load_model(open_checkpoint(checkpoint), dtype=dtype, device=CPU, on_progress=lambda _share: None)
    storage = build_storage(model.spec, num_blocks=120, block_size=BLOCK_SIZE, dtype=dtype)
    config = RunnerConfig(
        max_num_seqs=8, max_model_len=128, block_size=BLOCK_SIZE, seed=0, enable_recording=enable_recording
    )
    runner = ModelRunner(model, storage, config, device=CPU)
    core = EngineCore(
        EngineCoreConfig(
            kv_cache=small_kv_cache(),
            scheduler=SchedulerConfig(max_num_seqs=8),
            max_model_len=128,
            num_blocks=120,
            block_size=BLOCK_SIZE,
        ),
        runner,
    )
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}

    def add(index: int, max_tokens: int) -> None:
        tokens[f"r{index}"], logprobs[f"r{index}"] = [], []
        core.add_request(
            EngineRequest(
                request_id=f"r{index}",
                prompt_token_ids=list(range(index * 7, index * 12 + 3)),
                params=SamplingParams(max_tokens=max_tokens, logprobs=0, **params),  # type: ignore[arg-type]
            )
        )

    for index in range(6):
        add(index, 4 + 5 * index)
    steps = 0
    while core.has_unfinished:
        for output in core.step(now=0.0):
            tokens[output.request_id] += output.new_token_ids
            logprobs[output.request_id] += [each.logprob for each in output.logprobs]
        steps += 1
        if steps == 10:
            add(6, 20)
    return Made(tokens=tokens, logprobs=logprobs, num_replays=num_replays(runner))


def num_replays(runner: ModelRunner) -> int:
    return sum(path.num_replays for path in runner._paths if isinstance(path, RecordedPath))


def test_prompt_logprobs_keep_nobody_from_being_replayed(backend: str, llama_checkpoint: Path) -> None:
    """Only the steps that make them run as they are: those of the prompt."""
    plain = run(llama_checkpoint, torch.float32, enable_recording=True, temperature=0.0)
    asked = run(llama_checkpoint, torch.float32, enable_recording=True, temperature=0.0, prompt_logprobs=1)
    assert asked.tokens == plain.tokens
    assert asked.num_replays == plain.num_replays > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replayed_steps_are_the_steps(backend: str, llama_checkpoint: Path, dtype: torch.dtype) -> None:
    replayed = run(llama_checkpoint, dtype, enable_recording=True, temperature=0.0)
    eager = run(llama_checkpoint, dtype, enable_recording=False, temperature=0.0)
    assert replayed.tokens == eager.tokens
    assert replayed.logprobs == eager.logprobs
    assert eager.num_replays == 0
    assert replayed.num_replays >= 15


def test_sampling_and_processors_work_on_replayed_logits(backend: str, llama_checkpoint: Path) -> None:
    params = {"temperature": 1.5, "top_k": 30, "repetition_penalty": 1.4, "seed": 3}
    replayed = run(llama_checkpoint, torch.bfloat16, enable_recording=True, **params)
    eager = run(llama_checkpoint, torch.bfloat16, enable_recording=False, **params)
    assert (replayed.tokens, replayed.logprobs) == (eager.tokens, eager.logprobs)


def test_recordings_end_with_the_table_of_positions(
    backend: str, llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of rotations grows while requests run, and lies elsewhere afterwards."""
    eager = run(llama_checkpoint, torch.bfloat16, enable_recording=False, temperature=0.0)
    monkeypatch.setattr(rope_table, "_FIRST_ROWS", 4)
    replayed = run(llama_checkpoint, torch.bfloat16, enable_recording=True, temperature=0.0)
    assert replayed.tokens == eager.tokens
    assert replayed.num_replays > 0


def test_a_model_that_cannot_be_recorded_runs_as_it_is(llama_checkpoint: Path) -> None:
    with native.use_isa(native.NO_ISA):
        asked = run(llama_checkpoint, torch.float32, enable_recording=True, temperature=0.0)
        eager = run(llama_checkpoint, torch.float32, enable_recording=False, temperature=0.0)
    assert asked.tokens == eager.tokens
    assert asked.num_replays == 0
