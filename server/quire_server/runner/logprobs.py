"""Log-probabilities as requests see them: of the model's own distribution, before any processing (raw_logprobs)."""

from collections.abc import Sequence

import torch

from quire_kernels import token_logprobs
from quire_server.engine.output import TokenLogprobs


def build_token_logprobs(
    logits: torch.Tensor,  # [num_rows, vocab_size] float32, unprocessed
    token_ids: torch.Tensor,  # [num_rows] int64, the token whose probability is asked
    num_top: Sequence[int],  # [num_rows] alternatives to list
) -> list[TokenLogprobs]:
    """Log-probability and rank of each row's token, and the row's most likely tokens."""
    logprobs, ranks, top_logprobs, top_ids = token_logprobs(logits, token_ids, min(max(num_top), logits.shape[1]))
    columns = zip(
        token_ids.tolist(),
        logprobs.tolist(),
        ranks.tolist(),
        num_top,
        top_ids.tolist(),
        top_logprobs.tolist(),
        strict=True,
    )
    return [
        TokenLogprobs(token_id, logprob, rank, list(zip(ids[:k], values[:k], strict=True)))
        for token_id, logprob, rank, k, ids, values in columns
    ]
