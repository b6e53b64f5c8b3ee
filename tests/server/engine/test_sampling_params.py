"""What `SamplingParams` takes, and how it names what it refuses. The accepted forms are those of vLLM's class."""

from typing import Any

import msgspec
import numpy as np
import pytest

from quire_server.engine.border.validation import validate_sampling
from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "given", "held"),
    [
        ("stop", "located", ("located",)),
        ("stop", ["a", "bc"], ("a", "bc")),
        ("stop", None, ()),
        ("stop_token_ids", [1, 2], (1, 2)),
        ("stop_token_ids", None, ()),
        ("allowed_token_ids", [3], (3,)),
        ("allowed_token_ids", np.array([3, 4]), (3, 4)),
        ("logit_bias", {"5": 100}, {5: 100.0}),
        ("logit_bias", {"5": "1.5"}, {5: 1.5}),
        ("logit_bias", None, {}),
        ("logit_bias", {np.int64(5): np.float32(1.5)}, {5: 1.5}),
        ("temperature", 1, 1.0),
        ("temperature", np.float32(0.5), 0.5),
        ("max_tokens", np.int32(7), 7),
        ("max_tokens", None, None),
        ("seed", None, None),
    ],
)
def test_forms_that_are_taken(name: str, given: Any, held: Any) -> None:
    params = SamplingParams(**{name: given})
    assert getattr(params, name) == held
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("stop", 7),
        ("stop", ["a", 7]),
        ("stop", ["a", ""]),
        ("stop", ""),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", 5),
        ("allowed_token_ids", [True]),
        ("allowed_token_ids", []),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {"": 1.0}),
        ("logit_bias", {5.5: 1.0}),
        ("logit_bias", {5: "warm"}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {5: float("-inf")}),
        ("logit_bias", [5, 1.0]),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", float("nan")),
        ("top_k", 5.0),
        ("max_tokens", 4.0),
        ("max_tokens", "4"),
        ("n", True),
        ("n", None),
        ("ignore_eos", 1),
        ("seed", 1.5),
        ("logprobs", 2.0),
    ],
)
def test_forms_that_are_refused_by_name(name: str, given: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: given})
    assert caught.value.param == name
    assert name in str(caught.value)


def test_a_bad_key_of_logit_bias_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="'x1'"):
        SamplingParams(logit_bias={"x1": 1.0, 5: 1.0})  # type: ignore[dict-item]  # as JSON has it


def test_a_long_value_does_not_fill_the_message() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(seed="x" * 10_000)  # type: ignore[arg-type]  # what is refused
    assert len(str(caught.value)) < 200


VOCAB_SIZE, EOS = 10, (2,)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"allowed_token_ids": (2,), "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": (2, 5), "stop_token_ids": (5,), "min_tokens": 3}, "allowed_token_ids"),
        ({"allowed_token_ids": (5,), "stop_token_ids": (5,), "min_tokens": 1, "ignore_eos": True}, "allowed_token_ids"),
        ({"stop_token_ids": tuple(range(VOCAB_SIZE)), "min_tokens": 1}, "stop_token_ids"),
        ({"stop_token_ids": tuple(each for each in range(VOCAB_SIZE) if each != 2), "min_tokens": 1}, "stop_token_ids"),
    ],
)
def test_masks_that_leave_no_token_are_refused(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match="no token is left") as caught:
        validate_sampling(SamplingParams(**params), EOS, VOCAB_SIZE)
    assert caught.value.param == field
    assert ("of allowed_token_ids" in str(caught.value)) is ("allowed_token_ids" in params)


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": (2,)},
        {"allowed_token_ids": (2, 3), "min_tokens": 1},
        {"allowed_token_ids": (2,), "min_tokens": 1, "ignore_eos": True},
        {"stop_token_ids": tuple(range(VOCAB_SIZE))},
        {"stop_token_ids": tuple(range(VOCAB_SIZE - 1)), "min_tokens": 1},
    ],
)
def test_masks_that_leave_a_token_are_taken(params: dict[str, Any]) -> None:
    validate_sampling(SamplingParams(**params), EOS, VOCAB_SIZE)
