"""What a worker of each rank holds, and where it runs."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from quire_server.engine.step import NewRequestData, Runner, ScheduledRequest, SchedulerOutput
from quire_server.engine_process.startup import max_step_s, num_steps_ahead
from quire_server.models import registry
from quire_server.models.planning.sharding import ModelShare
from quire_server.runner import worker
from quire_server.runner.device import choose_device, use_device
from quire_server.runner.executor import start_executor
from quire_server.runner.worker import Stopwatch, plan_worker, share_of, start_worker
from quire_server.shared.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from quire_server.shared.errors import ConfigError
from quire_server.shared.sampling_params import SamplingParams


def config_of(model: Path = Path("m"), device: str = "cpu", *, tensor: int = 1, pipeline: int = 1) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model="m", path=model, served_model_names=("m",), dtype="float32", max_model_len=64),
        cache=CacheConfig(num_gpu_blocks_override=9),
        scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64),
        parallel=ParallelConfig(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline),
        device=device,  # type: ignore[arg-type]
    )


def test_neighbouring_ranks_share_layers_and_stages_follow_one_another() -> None:
    config = config_of(tensor=2, pipeline=3)
    assert config.parallel.world_size == 6
    assert [share_of(config, rank, 7) for rank in range(6)] == [
        ModelShare(rank=rank, world_size=2, layers=layers)
        for layers in (range(3), range(3, 5), range(5, 7))
        for rank in range(2)
    ]
    assert share_of(config_of(), 0, 7) == ModelShare()


def test_a_worker_of_any_rank_starts_with_its_share(llama_checkpoint: Path) -> None:
    config = config_of(llama_checkpoint, tensor=2)
    whole = start(config_of(llama_checkpoint))
    shares = [start(config, rank) for rank in range(2)]
    num_bytes = [worker.model.num_parameter_bytes for worker in (whole, *shares)]
    assert num_bytes[0] / 2 < num_bytes[1] == num_bytes[2] < num_bytes[0]
    assert shares[0].plan.budget.weights == num_bytes[1], "what was planned is what is held"
    stages = [start(config_of(llama_checkpoint, pipeline=2), rank) for rank in range(2)]
    assert [stage.plan.budget.weights for stage in stages] == [stage.model.num_parameter_bytes for stage in stages]


def start(config: EngineConfig, rank: int = 0):
    plan = plan_worker(config, rank)
    return start_worker(plan, plan.kv_cache, on_progress=lambda _: None, stopwatch=Stopwatch({}))


def test_an_executor_of_several_workers_is_refused_by_name(llama_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="4 workers") as caught:
        start_executor(
            config_of(llama_checkpoint, tensor=2, pipeline=2), on_progress=lambda _: None, stopwatch=Stopwatch({})
        )
    assert "--tensor-parallel-size" in caught.value.termination.hint


def test_an_executor_of_one_worker_is_a_runner(llama_checkpoint: Path) -> None:
    executor: Runner = start_executor(config_of(llama_checkpoint), on_progress=lambda _: None, stopwatch=Stopwatch({}))
    reference = LlamaForCausalLM.from_pretrained(llama_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax().item()
    assert executor.submit(greedy_step()).result().sampled_token_ids == {"a": [expected]}
    assert not executor.is_asynchronous


def greedy_step() -> SchedulerOutput:
    request = NewRequestData(
        request_id="a",
        token_ids=[5, 6, 7],
        num_prompt_tokens=3,
        sampling_params=SamplingParams(temperature=0.0),
        eos_token_ids=(),
    )
    share = ScheduledRequest(request_id="a", epoch=0, first_position=0, num_tokens=3, num_samples=1, new_block_ids=[1])
    return SchedulerOutput(scheduled=[share], new_requests=[request])


def test_a_worker_plans_its_model_once_and_reads_nothing_before_it_starts(
    llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_plans = []
    build = registry.build_plan
    monkeypatch.setattr(registry, "build_plan", lambda *args: num_plans.append(1) or build(*args))
    monkeypatch.setattr(worker, "load_plan", lambda *args, **kwargs: pytest.fail("nothing is to be read"))
    plan = plan_worker(config_of(llama_checkpoint), 0)
    assert (len(num_plans), plan.kv_cache.num_blocks) == (1, 9)
    monkeypatch.undo()
    monkeypatch.setattr(registry, "build_plan", lambda *args: pytest.fail("it is planned"))
    smaller = plan.kv_cache.resized(7, 48)
    started = start_worker(plan, smaller, on_progress=lambda _: None, stopwatch=Stopwatch({}))
    assert (started.plan.num_blocks, started.plan.max_model_len) == (7, 48)


def test_a_worker_makes_its_gpu_the_current_one_before_anything_is_on_it(
    llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UsedError(Exception):
        pass

    def set_device(device: torch.device) -> None:
        raise UsedError(device)

    plan = replace(plan_worker(config_of(llama_checkpoint), 0), device=torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(UsedError, match="cuda:1"):
        start_worker(plan, plan.kv_cache, on_progress=lambda _: None, stopwatch=Stopwatch({}))
    use_device(torch.device("cpu"))


def test_a_step_on_an_accelerator_may_take_as_long_as_a_compiler_does() -> None:
    heartbeat_timeout_s = 60.0
    assert max_step_s(torch.device("cuda", 0)) >= 3 * heartbeat_timeout_s
    assert max_step_s(torch.device("cpu")) > max_step_s(torch.device("cuda", 0))


class TestDevice:
    @pytest.fixture(autouse=True)
    def two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def test_each_rank_has_a_gpu_of_its_own(self) -> None:
        assert [choose_device(config_of(device="auto", tensor=2), rank) for rank in range(2)] == [
            torch.device("cuda", 0),
            torch.device("cuda", 1),
        ]

    def test_a_cpu_that_is_asked_for_is_given(self) -> None:
        assert choose_device(config_of(device="cpu"), 0) == torch.device("cpu")

    def test_too_few_gpus_are_refused_with_the_numbers(self) -> None:
        with pytest.raises(ConfigError, match="needs 4 GPUs, and torch sees 2"):
            choose_device(config_of(device="cuda", tensor=4), 2)

    def test_no_gpu_is_the_cpu_unless_one_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert choose_device(config_of(device="auto"), 0) == torch.device("cpu")
        with pytest.raises(ConfigError, match="--device cuda"):
            choose_device(config_of(device="cuda"), 0)

    def test_gpus_that_the_driver_counts_and_cannot_initialise_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device(config_of(device="auto"), 0) == torch.device("cpu")
        with pytest.raises(ConfigError, match="--device cuda"):
            choose_device(config_of(device="cuda"), 0)


@pytest.mark.parametrize(
    ("asked", "is_asynchronous", "expected"),
    [(None, False, 0), (None, True, 1), (True, False, 1), (False, True, 0)],
)
def test_steps_ahead_are_for_devices_that_work_by_themselves(
    llama_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: bool | None,
    is_asynchronous: bool,
    expected: int,
) -> None:
    runner = start(config_of(llama_checkpoint)).runner
    monkeypatch.setattr(type(runner), "is_asynchronous", is_asynchronous)
    with caplog.at_level(logging.WARNING):
        assert num_steps_ahead(SchedulerConfig(async_scheduling=asked), runner) == expected
    is_in_vain = asked is True and not is_asynchronous
    warnings = [record for record in caplog.records if "a step late" in record.message]
    assert len(warnings) == (1 if is_in_vain else 0)
