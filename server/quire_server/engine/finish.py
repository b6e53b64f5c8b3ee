"""When a request is over, and with what words: vLLM's rules. Pure functions of one request."""

from typing import NamedTuple

from quire_server.engine.request import FinishReason, Request


class Finish(NamedTuple):
    reason: FinishReason
    stop_reason: int | None = None
    """The stop token id; None where end-of-sequence or a limit ended the request."""


def find_finish(request: Request, max_model_len: int) -> Finish | None:
    """Say whether the last token of a request ends it.

    A stop token counts from the `min_tokens`-th output token on. End-of-sequence goes before a stop token, and both
    before the limits, where one token is several of these.
    """
    params = request.sampling_params
    num_tokens = len(request.token_ids)
    num_output_tokens = num_tokens - len(request.prompt_token_ids)
    if num_output_tokens >= params.min_tokens:
        token_id = request.token_ids[-1]
        if token_id in request.eos_token_ids and not params.ignore_eos:
            return Finish(FinishReason.STOP)
        if token_id in params.stop_token_ids:
            return Finish(FinishReason.STOP, token_id)
    if num_output_tokens >= request.max_tokens or num_tokens >= max_model_len:
        return Finish(FinishReason.LENGTH)
    return None
