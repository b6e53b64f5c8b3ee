"""One step at a time: order of execution, who is sampled, prompt log-probabilities, block movement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kv_storage import build_storage
from transformers import LlamaForCausalLM

from quire_server.engine.step import BlockCopy, NewRequestData, RunnerOutput, ScheduledRequest, SchedulerOutput
from quire_server.models.decoder import DecoderModel
from quire_server.models.loader import load_model
from quire_server.runner import model_runner
from quire_server.runner.kv_cache import KVCacheStorage
from quire_server.runner.model_runner import ModelRunner, RunnerConfig
from quire_server.shared.sampling_params import SamplingParams
from quire_server.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")
BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [5, 17, 200, 33, 33, 90, 101, 7, 64, 12, 250]


@pytest.fixture(scope="module")
def model(llama_checkpoint: Path) -> DecoderModel:
    return load_model(
        open_checkpoint(llama_checkpoint), dtype=torch.float32, device=CPU, on_progress=lambda _share: None
    )


@pytest.fixture(scope="module")
def oracle(llama_checkpoint: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llama_checkpoint, dtype=torch.float32).eval()


@torch.inference_mode()
def logprobs_after(oracle: LlamaForCausalLM, token_ids: Sequence[int]) -> torch.Tensor:  # [num_tokens, vocab_size]
    return oracle(torch.tensor([token_ids])).logits[0].log_softmax(-1)


def build_runner(model: DecoderModel, *, has_host_pool: bool = False) -> ModelRunner:
    def allocate() -> KVCacheStorage:
        return build_storage(model.spec, num_blocks=16, block_size=BLOCK_SIZE)

    config = RunnerConfig(max_num_seqs=4, max_model_len=64, block_size=BLOCK_SIZE, seed=0)
    return ModelRunner(model, allocate(), config, device=CPU, host_storage=allocate() if has_host_pool else None)


@dataclass(frozen=True)
class New:
    """A request that enters, and what its first share brings."""

    data: NewRequestData
    block_ids: list[int]
    computed: int


def new(
    request_id: str, token_ids: list[int], block_ids: list[int], params: SamplingParams = GREEDY, *, computed: int = 0
) -> New:
    data = NewRequestData(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling_params=params,
        eos_token_ids=(),
    )
    return New(data, block_ids, computed)


def run(
    runner: ModelRunner,
    scheduled: Mapping[str, int],
    *,
    new: Sequence[New] = (),
    computed: Mapping[str, int] | None = None,
    new_block_ids: Mapping[str, Sequence[int]] | None = None,
    removed: Sequence[str] = (),
    swap_out: Sequence[BlockCopy] = (),
    swap_in: Sequence[BlockCopy] = (),
) -> RunnerOutput:
    positions = dict(computed or {}) | {each.data.request_id: each.computed for each in new}
    block_ids = dict(new_block_ids or {}) | {each.data.request_id: each.block_ids for each in new}
    num_known = {each.data.request_id: len(each.data.token_ids) for each in new}
    return runner.submit(
        SchedulerOutput(
            scheduled=[
                ScheduledRequest(
                    request_id=request_id,
                    epoch=0,
                    first_position=positions[request_id],
                    num_tokens=num_tokens,
                    num_samples=int(positions[request_id] + num_tokens >= num_known.get(request_id, len(PROMPT))),
                    new_block_ids=block_ids.get(request_id, ()),
                )
                for request_id, num_tokens in scheduled.items()
            ],
            new_requests=[each.data for each in new],
            removed_request_ids=removed,
            swap_out=swap_out,
            swap_in=swap_in,
        )
    ).result()


def test_a_step_without_tokens_is_fine(model: DecoderModel) -> None:
    assert run(build_runner(model), {}) == RunnerOutput()


def test_only_requests_whose_prompt_ends_are_sampled(model: DecoderModel, oracle: LlamaForCausalLM) -> None:
    runner = build_runner(model)
    output = run(runner, {"a": 5, "b": 3}, new=[new("a", PROMPT, [1, 2]), new("b", PROMPT[:3], [3])])
    assert output.sampled_token_ids == {"b": [int(logprobs_after(oracle, PROMPT[:3])[-1].argmax())]}
    output = run(runner, {"a": 6}, computed={"a": 5}, new_block_ids={"a": [4]})
    assert output.sampled_token_ids == {"a": [int(logprobs_after(oracle, PROMPT)[-1].argmax())]}


def test_a_request_id_can_leave_and_come_back_in_one_step(model: DecoderModel, oracle: LlamaForCausalLM) -> None:
    runner = build_runner(model)
    run(runner, {"a": 11}, new=[new("a", PROMPT, [1, 2, 3])])
    output = run(runner, {"a": 4}, removed=["a", "never seen"], new=[new("a", PROMPT[:4], [1])])
    assert output.sampled_token_ids == {"a": [int(logprobs_after(oracle, PROMPT[:4])[-1].argmax())]}


@pytest.mark.parametrize("chunks", [[11], [4, 7], [1, 1, 8, 1], [10, 1]])
@pytest.mark.parametrize("rows_at_a_time", [1, 3, 1000])
def test_prompt_logprobs(
    model: DecoderModel,
    oracle: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    chunks: list[int],
    rows_at_a_time: int,
) -> None:
    """In any chunking of the prompt and of the logits, beside a request that did not ask."""
    monkeypatch.setattr(model_runner, "logits_chunk_rows", lambda _vocab_size: rows_at_a_time)
    runner = build_runner(model)
    params = SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=1)
    run(runner, {"other": 5}, new=[new("other", PROMPT, [7, 8, 9])])
    found, computed = [], 0
    for index, count in enumerate(chunks):
        scheduled = {"other": 1, "a": count}
        state = {"other": 5 + index} | ({"a": computed} if index else {})
        first = [] if index else [new("a", PROMPT, [1, 2, 3], params)]
        output = run(runner, scheduled, new=first, computed=state)
        assert "other" not in output.prompt_logprobs
        found += output.prompt_logprobs.get("a", ())
        computed += count
    expected = logprobs_after(oracle, PROMPT)
    assert [each.token_id for each in found] == PROMPT[1:]
    for position, each in enumerate(found):
        row = expected[position]
        assert each.logprob == pytest.approx(row[each.token_id].item(), abs=1e-3)
        assert each.rank == int((row > row[each.token_id]).sum()) + 1
        assert [token_id for token_id, _ in each.top] == row.topk(2).indices.tolist()
    (sampled,) = output.logprobs["a"]
    assert sampled.token_id == expected[-1].argmax()
    assert sampled.logprob == pytest.approx(expected[-1].max().item(), abs=1e-3)


def test_a_sequence_goes_on_after_a_swap(model: DecoderModel, oracle: LlamaForCausalLM) -> None:
    """Out to the host, overwritten by somebody else, and in again, into other blocks."""
    runner = build_runner(model, has_host_pool=True)
    first = run(runner, {"a": 11}, new=[new("a", PROMPT, [1, 2, 3])]).sampled_token_ids["a"][0]
    out = [BlockCopy(1, 5), BlockCopy(2, 4), BlockCopy(3, 6)]
    run(runner, {"b": 11}, removed=["a"], new=[new("b", PROMPT[::-1], [1, 2, 3])], swap_out=out)
    output = run(
        runner,
        {"a": 1},
        removed=["b"],
        new=[new("a", [*PROMPT, first], [3, 9, 1], computed=11)],
        swap_in=[BlockCopy(5, 3), BlockCopy(4, 9), BlockCopy(6, 1)],
    )
    assert output.sampled_token_ids["a"] == [int(logprobs_after(oracle, [*PROMPT, first])[-1].argmax())]
