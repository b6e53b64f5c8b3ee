"""A step's input, gathered from rows, against the same written token by token."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from quire_server.engine.step import NewRequestData, ScheduledRequest
from quire_server.runner.input_batch import BatchState, InputBatch
from quire_server.shared.sampling_params import SamplingParams

CPU = torch.device("cpu")


def new_request(
    request_id: str,
    token_ids: list[int],
    *,
    num_prompt_tokens: int | None = None,
    prompt_logprobs: int | None = None,
) -> NewRequestData:
    return NewRequestData(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        sampling_params=SamplingParams(prompt_logprobs=prompt_logprobs),
        eos_token_ids=(),
    )


def share(
    request_id: str, first_position: int, num_tokens: int, new_block_ids: Sequence[int] = (), *, samples: bool = True
) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=request_id,
        epoch=0,
        first_position=first_position,
        num_tokens=num_tokens,
        num_samples=int(samples),
        new_block_ids=new_block_ids,
    )


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
        shares = []
        for request_id, request in requests.items():
            if rng.random() < 0.2:
                continue  # not in this step
            count = int(rng.integers(1, len(request.tokens) - request.computed + 1))
            missing = -(-(request.computed + count) // block_size) - len(request.blocks)
            new_blocks = tuple(range(next_block, next_block + missing))
            next_block += max(missing, 0)
            request.blocks.extend(new_blocks)
            samples = request.computed + count == len(request.tokens)
            shares.append(share(request_id, request.computed, count, new_blocks, samples=samples))
            scheduled[request_id] = count
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
            state.add(new_request(request_id, tokens))
            shares.append(share(request_id, computed, count, list(blocks), samples=computed + count == len(tokens)))
            scheduled[request_id] = count
        if not scheduled:
            continue
        batch = state.build(shares)
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
    state.add(new_request("a", list(range(10)), prompt_logprobs=0))
    assert state.build([share("a", 0, 10, [1, 2, 3])]).wants_hidden
    assert state.remove("a") == 0
    state.add(new_request("b", [7, 8]))
    batch = state.build([share("b", 0, 2, [9])])
    assert not batch.wants_hidden
    assert batch.token_ids.tolist() == [7, 8]
    assert batch.metadata.block_table.tolist() == [[9]]


def test_removing_what_never_came_is_nothing() -> None:
    assert make_state().remove("unknown") is None


def test_a_request_cannot_have_two_rows() -> None:
    state = make_state()
    state.add(new_request("a", [1]))
    with pytest.raises(ValueError, match="already has a row"):
        state.add(new_request("a", [1]))


def test_a_full_context_can_still_be_sampled_from() -> None:
    state = make_state(max_model_len=8)
    state.add(new_request("a", list(range(8))))
    batch = state.build([share("a", 0, 8, [1, 2])])
    assert batch.sampled.tolist() == [0]
    state.append_tokens(batch.rows, np.array([5]))
    assert state.num_tokens[state.row_of("a")] == 9


def test_a_resumed_request_knows_its_output() -> None:
    state = make_state()
    state.add(new_request("a", [1, 2, 3, 4, 5], num_prompt_tokens=3))
    batch = state.build([share("a", 4, 1, [1, 2])])
    assert batch.token_ids.tolist() == [5]
    assert state.num_prompt_tokens[batch.rows].tolist() == [3]


@pytest.mark.parametrize(
    ("first_position", "num_tokens", "is_wanted"),
    [(0, 1, True), (0, 5, True), (3, 2, True), (4, 1, False), (5, 1, False)],
)
def test_hidden_states_are_wanted_where_prompt_logprobs_are_made(
    first_position: int, num_tokens: int, is_wanted: bool
) -> None:
    """The last token of a prompt tells nothing of the prompt, nor do the ones after it."""
    state = make_state()
    state.add(new_request("a", [1, 2, 3, 4, 5, 6], num_prompt_tokens=5, prompt_logprobs=0))
    state.add(new_request("b", [1, 2, 3]))
    shares = [share("a", first_position, num_tokens, [1, 2]), share("b", 0, 3, [3])]
    assert state.build(shares).wants_hidden is is_wanted
    assert not state.build([share("b", 0, 3)]).wants_hidden


def test_nothing_grows_with_the_context() -> None:
    """A decode step's input has the step's tokens, and a block table no wider than the longest sequence's."""
    state = make_state(max_model_len=4096, block_size=16)
    state.add(new_request("a", [1] * 33))
    state.add(new_request("b", [2] * 5))
    batch = state.build([share("a", 32, 1, [1, 2, 3]), share("b", 4, 1, [4])])
    assert batch.token_ids.shape == batch.positions.shape == batch.metadata.slot_mapping.shape == (2,)
    assert batch.metadata.block_table.shape == (2, 3)
