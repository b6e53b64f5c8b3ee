"""A step's input, gathered from rows, against the same written token by token."""

import numpy as np
import pytest
import torch

from quire_server.engine.output import NewRequestData, RunningRequestData
from quire_server.runner.input_batch import BatchState, InputBatch
from quire_server.sampling_params import SamplingParams

CPU = torch.device("cpu")


def new_request(
    request_id: str,
    token_ids: list[int],
    block_ids: list[int],
    *,
    num_prompt_tokens: int | None = None,
    computed: int = 0,
) -> NewRequestData:
    return NewRequestData(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        sampling_params=SamplingParams(),
        eos_token_ids=(),
        block_ids=block_ids,
        num_computed_tokens=computed,
    )


def running(request_id: str, computed: int, new_block_ids: tuple[int, ...] = ()) -> RunningRequestData:
    return RunningRequestData(request_id=request_id, new_block_ids=new_block_ids, num_computed_tokens=computed)


def make_state(*, max_num_seqs: int = 4, max_model_len: int = 64, block_size: int = 4) -> BatchState:
    return BatchState(max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=block_size, device=CPU)


class NaiveRequest:
    def __init__(self, tokens: list[int], blocks: list[int], computed: int) -> None:
        self.tokens, self.blocks, self.computed = tokens, blocks, computed


def check(batch: InputBatch, requests: dict[str, NaiveRequest], scheduled: dict[str, int], block_size: int) -> None:
    """Every field, one token at a time."""
    token_ids, positions, slots, starts, sampled = [], [], [], [0], []
    for index, (request_id, count) in enumerate(scheduled.items()):
        request = requests[request_id]
        for position in range(request.computed, request.computed + count):
            token_ids.append(request.tokens[position])
            positions.append(position)
            slots.append(request.blocks[position // block_size] * block_size + position % block_size)
        starts.append(len(token_ids))
        seq_len = request.computed + count
        assert batch.metadata.seq_lens[index] == seq_len
        num_blocks = -(-seq_len // block_size)
        assert batch.metadata.block_table[index, :num_blocks].tolist() == request.blocks[:num_blocks]
        if seq_len == len(request.tokens):
            sampled.append(index)
    assert batch.request_ids == list(scheduled)
    assert batch.token_ids.tolist() == token_ids
    assert batch.positions.tolist() == positions
    assert batch.metadata.slot_mapping.tolist() == slots
    assert batch.metadata.query_start_loc.tolist() == starts
    assert batch.sampled.tolist() == sampled
    for tensor, dtype in (
        (batch.token_ids, torch.int64),
        (batch.positions, torch.int64),
        (batch.metadata.slot_mapping, torch.int64),
        (batch.metadata.block_table, torch.int32),
        (batch.metadata.seq_lens, torch.int32),
        (batch.metadata.query_start_loc, torch.int32),
    ):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()


@pytest.mark.parametrize("seed", range(20))
def test_random_steps(seed: int) -> None:
    """Requests come, go, are chunked, decode and grow, over rows that are used again."""
    rng = np.random.default_rng(seed)
    block_size = int(rng.choice([1, 2, 4, 16]))
    state = make_state(block_size=block_size)
    requests: dict[str, NaiveRequest] = {}
    next_block, next_id = 1, 0
    for _ in range(40):
        for request_id in list(requests):
            if rng.random() < 0.1 or len(requests[request_id].tokens) >= 60:
                del requests[request_id]
                state.remove(request_id)
        scheduled: dict[str, int] = {}
        updates = []
        for request_id, request in requests.items():
            if rng.random() < 0.2:
                continue  # not in this step
            count = int(rng.integers(1, len(request.tokens) - request.computed + 1))
            missing = -(-(request.computed + count) // block_size) - len(request.blocks)
            new_blocks = tuple(range(next_block, next_block + missing))
            next_block += max(missing, 0)
            request.blocks.extend(new_blocks)
            updates.append(running(request_id, request.computed, new_blocks))
            scheduled[request_id] = count
        state.update(updates)
        while len(requests) < 4 and rng.random() < 0.6:
            request_id = f"r{next_id}"
            next_id += 1
            tokens = rng.integers(0, 1000, int(rng.integers(1, 40))).tolist()
            computed = int(rng.integers(0, len(tokens)))
            count = int(rng.integers(1, len(tokens) - computed + 1))
            num_blocks = -(-(computed + count) // block_size)
            blocks = list(range(next_block, next_block + num_blocks))
            next_block += num_blocks
            requests[request_id] = NaiveRequest(tokens, blocks, computed)
            state.add(new_request(request_id, tokens, list(blocks), computed=computed))
            scheduled[request_id] = count
        if not scheduled:
            continue
        batch = state.build(scheduled)
        check(batch, requests, scheduled, block_size)
        sampled_tokens = rng.integers(0, 1000, len(batch.sampled))
        state.append_tokens(batch.rows[batch.sampled], sampled_tokens)
        for index, token_id in zip(batch.sampled, sampled_tokens.tolist(), strict=True):
            requests[batch.request_ids[index]].tokens.append(token_id)
        for request_id, count in scheduled.items():
            requests[request_id].computed += count
    assert next_id > 5


def test_a_row_that_is_used_again_starts_clean() -> None:
    state = make_state(max_num_seqs=1)
    state.add(new_request("a", list(range(10)), [1, 2, 3]))
    assert state.remove("a") == 0
    state.add(new_request("b", [7, 8], [9]))
    batch = state.build({"b": 2})
    assert batch.token_ids.tolist() == [7, 8]
    assert batch.metadata.block_table.tolist() == [[9]]


def test_removing_what_never_came_is_nothing() -> None:
    assert make_state().remove("unknown") is None


def test_a_request_cannot_have_two_rows() -> None:
    state = make_state()
    state.add(new_request("a", [1], [1]))
    with pytest.raises(ValueError, match="already has a row"):
        state.add(new_request("a", [1], [2]))


def test_a_full_context_can_still_be_sampled_from() -> None:
    state = make_state(max_model_len=8)
    state.add(new_request("a", list(range(8)), [1, 2]))
    batch = state.build({"a": 8})
    assert batch.sampled.tolist() == [0]
    state.append_tokens(batch.rows, np.array([5]))
    assert state.num_tokens[state.row_of("a")] == 9


def test_a_resumed_request_knows_its_output() -> None:
    state = make_state()
    state.add(new_request("a", [1, 2, 3, 4, 5], [1, 2], num_prompt_tokens=3, computed=4))
    batch = state.build({"a": 1})
    assert batch.token_ids.tolist() == [5]
    assert state.num_prompt_tokens[batch.rows].tolist() == [3]


def test_nothing_grows_with_the_context() -> None:
    """A decode step's input has the step's tokens, and a block table no wider than the longest sequence's."""
    state = make_state(max_model_len=4096, block_size=16)
    state.add(new_request("a", [1] * 33, [1, 2, 3], computed=32))
    state.add(new_request("b", [2] * 5, [4], computed=4))
    batch = state.build({"a": 1, "b": 1})
    assert batch.token_ids.shape == batch.positions.shape == batch.metadata.slot_mapping.shape == (2,)
    assert batch.metadata.block_table.shape == (2, 3)
