"""What a model says about a request, checked before it can reach a kernel. Pure.

What can be said without a model is checked where the request is built (`EngineRequest`). The API asks `check_token_ids`
and `validate_sampling` too, so that a client hears of a bad field before its answer begins.
"""

from collections.abc import Iterable

from quire_server.engine.request import EngineRequest
from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.pooling_params import PoolingParams
from quire_server.shared.sampling_params import SamplingParams


def validate_request(request: EngineRequest, vocab_size: int) -> None:
    """Refuse what the model does not do, and token ids that it does not have.

    Raises:
        InvalidRequestError: naming the field.
    """
    if isinstance(request.params, PoolingParams):
        raise InvalidRequestError(f"This model generates text; it cannot {request.params.task}.", param="task")
    if request.num_branches != 1:
        raise InvalidRequestError("This engine makes one answer of a request: ask once for each.", param="n")
    check_token_ids("prompt", request.prompt_token_ids, vocab_size)
    check_token_ids("eos_token_ids", request.eos_token_ids, vocab_size)
    validate_sampling(request.params, request.eos_token_ids, vocab_size)


def validate_sampling(params: SamplingParams, eos_token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuse token ids that the model does not have, and masks that together leave no token to sample.

    Raises:
        InvalidRequestError: naming the field.
    """
    check_token_ids("logit_bias", params.logit_bias, vocab_size)
    check_token_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    if params.min_tokens > 0:
        _check_that_something_is_left(params, eos_token_ids, vocab_size)


def _check_that_something_is_left(params: SamplingParams, eos_token_ids: Iterable[int], vocab_size: int) -> None:
    """Until `min_tokens` are there, the tokens that end an answer cannot be sampled; others have to be allowed."""
    ending = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    allowed = params.allowed_token_ids
    if ending.issuperset(allowed) if allowed is not None else len(ending) >= vocab_size:
        rest = "" if allowed is None else " of allowed_token_ids"
        raise InvalidRequestError(
            f"min_tokens is {params.min_tokens}, but every token{rest} ends the answer (end-of-sequence, or of "
            "stop_token_ids): no token is left to sample.",
            param="allowed_token_ids" if allowed is not None else "stop_token_ids",
        )


def check_token_ids(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        InvalidRequestError: naming `param` and the first of them.
    """
    ids = token_ids if isinstance(token_ids, list | tuple) else tuple(token_ids)
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        unknown = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        message = f"Token id {unknown} is out of vocabulary: ids are in [0, {vocab_size})."
        raise InvalidRequestError(message, param=param)
