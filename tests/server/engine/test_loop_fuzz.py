"""Any messages in any order to the engine's loop: each request and call ends once, and it goes on.

The runner has no model, and samples: whatever parameters are let through come to the real sampler's columns.
"""

from collections import Counter
from typing import Any

import msgspec
import numpy as np
import torch
from engine_fakes import VOCAB_SIZE, FakeRunner, make_engine_request
from hypothesis import given
from hypothesis import strategies as st
from loop_fakes import MAX_MODEL_LEN, add, altered, make_core, run

from quire_server.engine.border.calls import Call, ResetPrefixCache
from quire_server.engine.border.messages import (
    AbortRequests,
    AddRequest,
    ToEngine,
    encode,
)
from quire_server.engine.request import EngineRequest
from quire_server.engine.step import RunnerOutput, SchedulerOutput
from quire_server.runner.sampler import Sampler
from quire_server.shared.pooling_params import PoolingParams, PoolingTask

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
REQUEST_IDS = st.sampled_from(["a", "b", "c", "d"])


@st.composite
def requests(draw: st.DrawFn) -> ToEngine:
    if draw(st.integers(0, 5)) == 0:
        params = PoolingParams(task=draw(st.sampled_from(PoolingTask)))
        return AddRequest(EngineRequest(request_id=draw(REQUEST_IDS), prompt_token_ids=[1], params=params))
    return AddRequest(
        make_engine_request(
            draw(REQUEST_IDS),
            draw(st.lists(st.integers(0, VOCAB_SIZE), min_size=1, max_size=MAX_MODEL_LEN + 2)),
            max_tokens=draw(st.integers(0, 6)),
            stop_token_ids=tuple(draw(st.lists(st.integers(-1, VOCAB_SIZE), max_size=2))),
            prompt_logprobs=draw(st.none() | st.just(0)),
            priority=draw(st.integers(-2, 2)),
            cache_salt=draw(st.none() | st.text(max_size=2)),
        )
    )


@st.composite
def broken(draw: st.DrawFn, messages: st.SearchStrategy[ToEngine]) -> bytes:
    """A frame with anything in the place of one thing, at any depth; or with a key too many, or one too few."""
    decoded = msgspec.msgpack.decode(encode(draw(messages)))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(decoded)
    node, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        node[key] = draw(ANYTHING)
    else:
        del node[key]
    return msgspec.msgpack.encode(decoded)


INTEGERS = st.integers(-(2**63), 2**64 - 1) | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**53, 2**63, 2**64 - 1])
NUMBERS = st.floats() | INTEGERS | st.sampled_from([1e-320, 3.4e38, 1e39])
FIELDS: dict[str, st.SearchStrategy[object]] = {
    "top_k": INTEGERS,
    "min_tokens": INTEGERS,
    "seed": INTEGERS,
    "logprobs": INTEGERS,
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "min_p": NUMBERS,
    "presence_penalty": NUMBERS,
    "frequency_penalty": NUMBERS,
    "repetition_penalty": NUMBERS,
    "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1), NUMBERS, min_size=1, max_size=3),
    "allowed_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1) | INTEGERS, max_size=3),
    "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1) | INTEGERS, max_size=3),
}


@st.composite
def extreme(draw: st.DrawFn) -> bytes:
    """A request that asks of sampling what nobody should, in one field."""
    field = draw(st.sampled_from(list(FIELDS)))
    return altered(add(draw(REQUEST_IDS)), "request", "params", field, value=draw(FIELDS[field]))


class SamplingRunner(FakeRunner):
    """Samples of logits that mean nothing, with each request's own parameters, beside what the fake says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampler = Sampler(max_num_seqs=3, seed=0)
        self.rows: dict[str, int] = {}

    def execute(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        for request_id in scheduler_output.removed_request_ids:
            self.sampler.remove(self.rows.pop(request_id))
        for new in scheduler_output.new_requests:
            row = self.rows[new.request_id] = min({0, 1, 2} - set(self.rows.values()))
            self.sampler.add(row, new)
        output = super().execute(scheduler_output)
        rows = np.array([self.rows[each] for each, sampled in output.sampled_token_ids.items() if sampled], np.int64)
        if len(rows):
            logits = torch.linspace(-2.0, 3.0, VOCAB_SIZE).repeat(len(rows), 1)
            sampled = self.sampler.sample(logits, rows, np.zeros(len(rows), np.int64))
            assert all(0 <= token_id < VOCAB_SIZE for token_id in sampled.token_ids.tolist())
        return output


calls = st.builds(Call, call_id=st.integers(0, 2**63), method=st.just(ResetPrefixCache()))
aborts = st.builds(AbortRequests, request_ids=st.lists(REQUEST_IDS, max_size=3))
frames = st.one_of(
    requests().map(encode),
    broken(requests()),
    extreme(),
    broken(calls),
    broken(aborts),
    calls.map(encode),
    aborts.map(encode),
    st.binary(max_size=20),
    ANYTHING.map(msgspec.msgpack.encode),
)


def owner_of(frame: bytes) -> tuple[str, str | int] | None:
    """Whose frame it is, read as a person would: a request that can be named, or a call."""
    try:
        message = msgspec.msgpack.decode(frame)
    except Exception:  # noqa: BLE001 - it is nobody's
        return None
    if not isinstance(message, dict):
        return None
    request, call_id = message.get("request"), message.get("call_id")
    if message.get("type") == "AddRequest" and isinstance(request, dict):
        request_id = request.get("request_id")
        return ("request", request_id) if isinstance(request_id, str) else None
    if message.get("type") == "Call" and isinstance(call_id, int) and not isinstance(call_id, bool):
        return ("call", call_id)
    return None


@given(st.lists(st.lists(frames, max_size=5), max_size=8))
def test_each_request_and_each_call_ends_once_whatever_comes(batches: list[list[bytes]]) -> None:
    expected = Counter(owner for batch in batches for frame in batch if (owner := owner_of(frame)) is not None)
    batches = [[frame for frame in batch if not is_shutdown(frame)] for batch in batches]
    core = make_core()
    core._runner = SamplingRunner(20, 4)
    wire, _ = run(*batches, core=core)
    answered: Counter[tuple[str, str | int]] = Counter()
    for request_id, count in wire.ends().items():
        answered["request", request_id] += count
    for reply in wire.replies:
        answered["call", reply.call_id] += 1
    assert answered == expected
    later, _ = run([add("z")], core=core)
    assert later.ends() == {"z": 1}, "and the engine is as good as new"


def is_shutdown(frame: bytes) -> bool:
    try:
        message = msgspec.msgpack.decode(frame)
    except Exception:  # noqa: BLE001 - no message at all
        return False
    return isinstance(message, dict) and message.get("type") == "Shutdown"
