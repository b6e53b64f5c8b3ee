"""What a request asks of pooling: one vector or some scores for a whole text, instead of more text. No torch, no HTTP.

No model of this server pools yet; a request that asks for it is refused by name (`engine.border.validation`).
"""

from enum import StrEnum

import msgspec

from quire_server.shared.errors import InvalidRequestError


class PoolingTask(StrEnum):
    """What the vector of a text is for; vLLM's names."""

    EMBED = "embed"
    CLASSIFY = "classify"
    SCORE = "score"
    """Of a pair of texts; rerank is a score per document."""


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Pooling parameters of one request. An array in msgpack, as sampling parameters are a map: so both fit one field.

    Raises:
        InvalidRequestError: a value is out of range; `param` names the field.
    """

    task: PoolingTask
    dimensions: int | None = None
    """Length of the vector, of a model whose vectors can be cut (Matryoshka); None: the model's own."""
    normalize: bool | None = None
    """Vectors of length 1; None: as the model does it."""
    use_activation: bool | None = None
    """Scores through the model's softmax or sigmoid; None: as the model does it."""

    def __post_init__(self) -> None:
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequestError(f"dimensions must be at least 1, got {self.dimensions}.", param="dimensions")
