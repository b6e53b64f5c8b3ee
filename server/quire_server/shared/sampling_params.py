"""What a request asks of sampling: vLLM's names and defaults. No torch, no HTTP."""

import sys
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Final

from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.field_values import (
    read_flag,
    read_integer,
    read_number,
    read_texts,
    read_token_biases,
    read_token_ids,
)

MAX_LOGPROBS = 20
MAX_STOPS = 1024
"""Every stop string is looked for again with each token."""
MAX_STOP_CHARS = 16 * 1024
_INT_LIMIT = 2**31
_FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request. Every number fits the sampler's columns, which are of fixed width.

    Fields take what vLLM's take (`stop="END"`, a list for a tuple, None for none); they hold what they declare.

    Raises:
        InvalidRequestError: a value is of another type, or out of range; `param` names the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    """Below 1e-5 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1 both mean every token."""
    min_p: float = 0.0
    seed: int | None = None
    """64 bits, signed or not: -1 and 2**64 - 1 are the same."""
    stop: tuple[str, ...] = ()
    """Applied where text is made, not in the engine, which knows token ids alone."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: as many as the context has room for."""
    min_tokens: int = 0
    logprobs: int | None = None
    """Number of alternatives per sampled token; 0 gives the sampled token's alone."""
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, read in _READERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, read(name, value))
        self._check_ranges()

    def _check_ranges(self) -> None:
        def require(condition: bool, name: str, rule: str) -> None:
            if not condition:
                raise InvalidRequestError(f"{name} must be {rule}, got {getattr(self, name)!r}.", param=name)

        for name in ("n", "top_k", "max_tokens", "min_tokens"):
            require((getattr(self, name) or 0) < _INT_LIMIT, name, "below 2**31")
        require(self.n >= 1, "n", "at least 1")
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]")
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]")
        require(self.repetition_penalty > 0.0, "repetition_penalty", "greater than 0")
        require(self.repetition_penalty <= _FLOAT32_MAX, "repetition_penalty", "finite in float32")
        require(0.0 <= self.temperature <= sys.float_info.max, "temperature", "a finite number of at least 0")
        require(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        require(self.top_k >= -1, "top_k", "at least -1")
        require(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        require(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "at least 0")
        require(self.min_tokens >= 0, "min_tokens", "at least 0")
        most = self.max_tokens
        require(most is None or self.min_tokens <= most, "min_tokens", f"at most max_tokens, which is {most}")
        if len(self.stop) > MAX_STOPS or sum(map(len, self.stop)) > MAX_STOP_CHARS:
            rule = f"stop must hold at most {MAX_STOPS} strings of {MAX_STOP_CHARS} characters in all."
            raise InvalidRequestError(rule, param="stop")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= MAX_LOGPROBS, name, f"in [0, {MAX_LOGPROBS}]")
        biases = self.logit_bias.values()
        require(all(-_FLOAT32_MAX <= bias <= _FLOAT32_MAX for bias in biases), "logit_bias", "finite in float32")
        require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "in 64 bits")
        require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            "not empty",
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


_READERS: Final[Mapping[str, Callable[[str, Any], object]]] = {
    **dict.fromkeys(("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"), read_integer),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), read_number),
    **dict.fromkeys(("temperature", "top_p", "min_p"), read_number),
    **dict.fromkeys(("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"), read_flag),
    "include_stop_str_in_output": read_flag,
    "stop": read_texts,
    "stop_token_ids": read_token_ids,
    "allowed_token_ids": read_token_ids,
    "logit_bias": read_token_biases,
}
_OPTIONAL: Final = frozenset({"seed", "max_tokens", "logprobs", "prompt_logprobs", "allowed_token_ids"})
"""Those of which None says something else than an empty value."""


def params_of_answer(params: SamplingParams, answer: int) -> SamplingParams:
    """Return the parameters of one of several answers: a seed is the first one's, and the next count up from it."""
    if answer == 0 or params.seed is None:
        return params
    own = copy(params)  # `replace` would read and check every field again, which may hold the whole vocabulary
    object.__setattr__(own, "seed", (params.seed + answer + 2**63) % 2**64 - 2**63)  # wraps, as 64 bits do
    return own
