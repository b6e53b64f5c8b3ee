"""How long a text may be to be tokenised at all. Pure.

A text of more bytes than the context's tokens could ever stand for is hopeless, and is refused before it costs
anything. Where its tokens are cut to size afterwards, or nothing bounds what one token stands for, a generous limit
holds instead: tokenising takes hundreds of bytes of memory for each byte of text.
"""

from dataclasses import dataclass
from typing import Final

from quire_server.shared.errors import ContextLengthError

MAX_CUT_BYTES: Final = 4 * 1024 * 1024
"""The longest text that may be cut to size, for a model whose context needs no longer ones."""
MAX_LISTED_TOKENS: Final = 2**19
"""The most ids that are listed, likewise: making the list holds the interpreter's lock, for 35 ms if it is so long."""
_ASSUMED_BYTES_PER_TOKEN: Final = 128
"""The longest tokens of most vocabularies are runs of 64 to 128 spaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLimits:
    """What one text may be."""

    max_model_len: int
    max_bytes: int
    max_tokens: int

    @classmethod
    def of(cls, max_model_len: int, max_bytes_per_token: int | None, *, is_cut: bool) -> "TextLimits":
        """Return the limits for a model; with `is_cut` the tokens need not fit its context."""
        max_bytes = max_model_len * (max_bytes_per_token or _ASSUMED_BYTES_PER_TOKEN)
        return cls(
            max_model_len=max_model_len,
            max_bytes=max(max_bytes, MAX_CUT_BYTES) if is_cut or max_bytes_per_token is None else max_bytes,
            max_tokens=max(max_model_len, MAX_LISTED_TOKENS),
        )

    def check(self, text: str, param: str) -> None:
        """Refuse a hopeless text. Raises ContextLengthError."""
        if len(text) * 4 <= self.max_bytes:  # no character has more bytes
            return
        if len(text) > self.max_bytes or len(text.encode(errors="surrogatepass")) > self.max_bytes:
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your {param} has more "
                f"than {self.max_bytes} bytes, which is more than could ever be taken. Please reduce its length.",
                param=param,
            )
