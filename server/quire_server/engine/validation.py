"""What the model's vocabulary says about a request, checked before it can reach a kernel. Pure."""

from collections.abc import Iterable

from quire_server.engine.request import EngineRequest
from quire_server.errors import InvalidRequestError


def validate_request(request: EngineRequest, vocab_size: int) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        InvalidRequestError: naming the field.
    """
    params = request.sampling_params
    _require_known("prompt", request.prompt_token_ids, vocab_size)
    _require_known("logit_bias", params.logit_bias, vocab_size)
    _require_known("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _require_known("stop_token_ids", params.stop_token_ids, vocab_size)
    _require_known("eos_token_ids", request.eos_token_ids, vocab_size)


def _require_known(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    ids = token_ids if isinstance(token_ids, list | tuple) else tuple(token_ids)
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        unknown = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InvalidRequestError(
            f"{name} has the token id {unknown}, and the model's ids go from 0 to {vocab_size - 1}.", param=name
        )
