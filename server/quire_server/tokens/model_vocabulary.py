"""What a tokenizer and a model's files name that the model does not have: found when they are loaded, not at a request.

An end token that is none is dropped with a warning, as llama.cpp does; a tokenizer by which no prompt can be served is
refused.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeGuard

from quire_server.shared.errors import CheckpointError
from quire_server.weights.stored import read_json

log = logging.getLogger(__name__)


def read_model_vocab_size(path: Path) -> int | None:
    """Return how many tokens a model directory's config speaks of; None: there is none that does."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    vocab_size = config.get("vocab_size")
    return vocab_size if isinstance(vocab_size, int) else None


def known_end_tokens(declared: Iterable[object], vocab_size: int | None) -> tuple[int, ...]:
    """Return the end tokens that are tokens of the model, each once, in their order. None: its size is not known."""
    known: dict[int, None] = {}
    for token_id in declared:
        if _is_token_id(token_id) and (vocab_size is None or token_id < vocab_size):
            known[token_id] = None
        else:
            ids = "no token id" if vocab_size is None else f"none of the model's token ids, 0 to {vocab_size - 1}"
            log.warning("The end token %s is %s: no answer ends by it", json.dumps(token_id, default=str), ids)
    return tuple(known)


def _is_token_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_vocabulary(num_tokens: int, always_added: Sequence[int], vocab_size: int | None) -> None:
    """Check that a tokenizer fits a model.

    Args:
        num_tokens: of the tokenizer.
        always_added: the tokens that it puts around every prompt.

    Raises CheckpointError: no prompt can be served.
    """
    if vocab_size is None or num_tokens <= vocab_size:
        return
    for token_id in always_added:
        if token_id >= vocab_size:
            raise CheckpointError(
                f"The tokenizer puts token {token_id} around every prompt, but the model has {vocab_size} tokens.",
                hint="Use the model's own tokenizer.",
            )
    log.warning(
        "The tokenizer has %d tokens, the model %d: requests whose text contains one of the others are refused",
        num_tokens,
        vocab_size,
    )
