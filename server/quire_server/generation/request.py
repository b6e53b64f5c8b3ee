"""What is asked for: prompts, ready for the engine, and what holds for all of them. Pure data, of no dialect.

The choices of a request are numbered through: those of the first prompt first, as many as its `sampling_params.n`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quire_server.shared.errors import InvalidRequestError
from quire_server.shared.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, ready for the engine; `sampling_params.n` answers to it are wanted."""

    token_ids: list[int]
    sampling_params: SamplingParams
    """`max_tokens` is filled in (never None); 0: only the prompt's own log-probabilities are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Everything that one client asked for at once.

    Raises:
        InvalidRequestError: there is no prompt.
    """

    request_id: str
    """For logs and for the engine's ids, which begin with it; two requests may have the same."""
    prompts: Sequence[Prompt]
    priority: int = 0
    """Lower runs first, under the priority policy."""
    cache_salt: str | None = None
    """Only requests with an equal salt share cached prefixes."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InvalidRequestError("At least one prompt is needed.", param="prompt")

    @property
    def choice_to_prompt(self) -> list[int]:
        """For each choice, the index of the prompt that it answers."""
        return [index for index, prompt in enumerate(self.prompts) for _ in range(prompt.sampling_params.n)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Tokens of a request, over all its prompts and choices. A prompt counts once, however many answers it has."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that the prefix cache already held."""
    num_output_tokens: int
