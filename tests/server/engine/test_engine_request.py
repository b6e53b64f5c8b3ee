"""What is checked where a request is built, and that decoding one is building it."""

import dataclasses
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from quire_server.engine.border.validation import validate_request
from quire_server.engine.request import EngineRequest
from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.pooling_params import PoolingParams, PoolingTask
from quire_server.shared.sampling_params import SamplingParams, params_of_answer

GOOD: dict[str, Any] = {"request_id": "a", "prompt_token_ids": [1, 2], "params": SamplingParams(max_tokens=0)}
BAD = [
    ("request_id", "", "request_id"),
    ("prompt_token_ids", [], "prompt"),
    ("prompt_token_ids", [1, -1], "prompt"),
    ("prompt_token_ids", [1, 2**40], "prompt"),
    ("params", SamplingParams(max_tokens=None), "max_tokens"),
    ("arrival_time", math.nan, "arrival_time"),
    ("arrival_time", -math.inf, "arrival_time"),
    ("priority", 2**31, "priority"),
    ("priority", -(2**31) - 1, "priority"),
    ("num_branches", 0, "n"),
]


@pytest.mark.parametrize(("field", "value", "param"), BAD)
def test_what_could_run_on_no_model_is_not_built(field: str, value: object, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EngineRequest(**{**GOOD, field: value})
    assert caught.value.param == param


@pytest.mark.parametrize(("field", "value", "param"), BAD)
def test_nor_is_it_decoded_and_the_field_is_still_named(field: str, value: object, param: str) -> None:
    frame = msgspec.msgpack.encode({**GOOD, field: value})
    with pytest.raises(InvalidRequestError) as caught:
        msgspec.msgpack.decode(frame, type=EngineRequest)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", [[1.5], ["1"], [None], [[1]]])
def test_a_prompt_is_of_integers(prompt: list[Any]) -> None:
    with pytest.raises(InvalidRequestError, match="no token id"):
        EngineRequest(request_id="a", prompt_token_ids=prompt, params=SamplingParams())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bias_is_finite(value: float) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(logit_bias={1: value})
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize(
    ("field", "last_good", "first_bad"),
    [
        ("n", 2**31 - 1, 2**31),
        ("top_k", 2**31 - 1, 2**31),
        ("top_k", 2**31 - 1, 2**63),
        ("max_tokens", 2**31 - 1, 2**31),
        ("min_tokens", 2**31 - 1, 2**31),
        pytest.param("temperature", 1.7e308, 2**1024, id="temperature"),
        ("repetition_penalty", float(np.finfo(np.float32).max), 3.5e38),
        ("repetition_penalty", 2, math.inf),
        ("logit_bias", {1: float(np.finfo(np.float32).max)}, {1: 3.5e38}),
        ("logit_bias", {1: -float(np.finfo(np.float32).max)}, {1: -1e39}),
    ],
)
def test_numbers_fit_the_samplers_columns(field: str, last_good: Any, first_bad: Any) -> None:
    others = {} if field == "max_tokens" else {"max_tokens": None}
    SamplingParams(**others, **{field: last_good})
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**others, **{field: first_bad})
    assert caught.value.param == field


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_has_64_bits(seed: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(seed=seed)
    assert caught.value.param == "seed"


@pytest.mark.parametrize("seed", [0, 7, -1, -(2**63), 2**63 - 2, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
@pytest.mark.parametrize("answer", [0, 1, 2, 130])
def test_seeds_of_several_answers_count_up_as_64_bits_do(seed: int, answer: int) -> None:
    of_answer = params_of_answer(SamplingParams(seed=seed, n=131), answer).seed
    assert of_answer is not None
    with np.errstate(over="ignore"):
        assert np.uint64(of_answer % 2**64) == np.uint64(seed % 2**64) + np.uint64(answer)


def test_parameters_of_several_answers_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias for each token of a vocabulary takes 60 ms to read; 128 answers held the event loop for eight seconds."""
    params = SamplingParams(seed=5, n=128, logit_bias={1: 2.0})
    expected = dataclasses.replace(params, seed=6)
    monkeypatch.setattr(SamplingParams, "__post_init__", None)
    assert params_of_answer(params, 1) == expected
    assert params.seed == 5


def test_answers_without_a_seed_have_none() -> None:
    assert params_of_answer(SamplingParams(n=2), 1) == SamplingParams(n=2)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=3, seed=2**64 - 1),
        SamplingParams(max_tokens=3, seed=-(2**63), logit_bias={4: -1.0}, stop=("a",)),
        PoolingParams(task=PoolingTask.EMBED, dimensions=256, normalize=True),
        PoolingParams(task=PoolingTask.SCORE, use_activation=False),
    ],
)
def test_both_kinds_of_parameters_cross(params: SamplingParams | PoolingParams) -> None:
    request = EngineRequest(request_id="a", prompt_token_ids=[0, 2**32 - 1], params=params, num_branches=3)
    crossed = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=EngineRequest)
    assert crossed == request
    assert type(crossed.params) is type(params)


def test_pooling_parameters_are_checked() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PoolingParams(task=PoolingTask.EMBED, dimensions=0)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize("task", list(PoolingTask))
def test_a_model_that_generates_refuses_to_pool(task: PoolingTask) -> None:
    request = EngineRequest(**{**GOOD, "params": PoolingParams(task=task)})
    with pytest.raises(InvalidRequestError, match=f"This model generates text; it cannot {task.value}") as caught:
        validate_request(request, vocab_size=10)
    assert caught.value.param == "task"


def test_several_branches_are_refused_until_an_engine_makes_them() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate_request(EngineRequest(**GOOD, num_branches=2), vocab_size=10)
    assert caught.value.param == "n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", {"prompt_token_ids": [1, 10, 11]}),
        ("eos_token_ids", {"eos_token_ids": (10,)}),
        ("logit_bias", {"params": SamplingParams(logit_bias={10: 1.0})}),
        ("allowed_token_ids", {"params": SamplingParams(allowed_token_ids=(9, 10))}),
        ("stop_token_ids", {"params": SamplingParams(stop_token_ids=(-1,))}),
    ],
)
def test_token_ids_that_the_model_does_not_have_are_refused_by_field(field: str, value: dict[str, Any]) -> None:
    text = r"^Token id (10|-1) is out of vocabulary: ids are in \[0, 10\)\.$"
    with pytest.raises(InvalidRequestError, match=text) as caught:
        validate_request(EngineRequest(**{**GOOD, **value}), vocab_size=10)
    assert caught.value.param == field
