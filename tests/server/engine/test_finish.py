import pytest
from engine_fakes import make_request

from quire_server.engine.finish import Finish, find_finish
from quire_server.engine.request import FinishReason

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
EOS = 9


@pytest.mark.parametrize(
    ("output", "params", "expected"),
    [
        pytest.param([1], {}, None, id="an ordinary token goes on"),
        pytest.param([1, EOS], {}, Finish(STOP, None), id="end-of-sequence has no stop reason"),
        pytest.param([8], {}, Finish(STOP, None), id="any of several end-of-sequence tokens counts"),
        pytest.param([EOS], {"ignore_eos": True}, None, id="end-of-sequence is ignored if asked"),
        pytest.param([5], {"stop_token_ids": (4, 5)}, Finish(STOP, 5), id="a stop token is the stop reason"),
        pytest.param(
            [EOS], {"stop_token_ids": (EOS,)}, Finish(STOP, None), id="end-of-sequence goes before the same stop token"
        ),
        pytest.param(
            [EOS],
            {"stop_token_ids": (EOS,), "ignore_eos": True},
            Finish(STOP, EOS),
            id="a stop token counts where end-of-sequence is ignored",
        ),
        pytest.param([1, EOS], {"min_tokens": 3}, None, id="end-of-sequence is too early before min_tokens"),
        pytest.param([1, 5], {"min_tokens": 3, "stop_token_ids": (5,)}, None, id="so is a stop token"),
        pytest.param([1, 1, EOS], {"min_tokens": 3}, Finish(STOP, None), id="the min_tokens-th token may stop"),
        pytest.param([1, 2, 3, 4], {"max_tokens": 4}, Finish(LENGTH, None), id="max_tokens is a length"),
        pytest.param([1, 2, 3, EOS], {"max_tokens": 4}, Finish(STOP, None), id="a stop goes before the length"),
        pytest.param([1] * 10, {"max_tokens": 50}, Finish(LENGTH, None), id="the context is full"),
    ],
)
def test_finish(output: list[int], params: dict[str, object], expected: Finish | None) -> None:
    request = make_request(prompt=range(10), eos_token_ids=(EOS, 8), **params)
    request.token_ids += output
    assert find_finish(request, max_model_len=20) == expected


def test_a_stop_token_in_the_prompt_is_no_stop() -> None:
    request = make_request(prompt=[EOS], eos_token_ids=(EOS,))
    request.token_ids.append(1)
    assert find_finish(request, max_model_len=20) is None
