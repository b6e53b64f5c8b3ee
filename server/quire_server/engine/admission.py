"""What can never run is refused at the door. Pure."""

from quire_server.engine.kv_cache_manager import KVCacheManager
from quire_server.engine.request import Request
from quire_server.shared.errors import ContextLengthError, InvalidRequestError


def refuse_if_impossible(request: Request, kv_cache: KVCacheManager, max_model_len: int) -> None:
    """Check that a request could run if it had the engine for itself.

    Raises:
        ContextLengthError: prompt and answer are longer than the model's context.
        InvalidRequestError: the KV cache is too small.
    """
    num_prompt_tokens, max_tokens = request.num_prompt_tokens, request.max_tokens
    if num_prompt_tokens + max_tokens > max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} in the prompt, {max_tokens} in the "
            "completion). Please reduce the length of the prompt or of the completion.",
            "max_tokens" if num_prompt_tokens < max_model_len else "prompt",
        )
    # The last token sampled is never computed, so it needs no room.
    if not kv_cache.fits_alone(num_prompt_tokens + max(max_tokens - 1, 0)):
        raise InvalidRequestError(
            f"The KV cache holds {kv_cache.capacity_tokens} tokens, which is less than the "
            f"{num_prompt_tokens + max_tokens} tokens requested ({num_prompt_tokens} in the prompt, {max_tokens} "
            "in the completion). Please reduce the length of the prompt or of the completion.",
            "max_tokens",
        )
