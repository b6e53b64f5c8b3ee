"""From the engine's token ids to what a client is shown: text, finish reason, log-probabilities with their texts.

Used by the HTTP layer (through `Frontend`) and by `LLM`. Pure: no clock, no sockets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from quire_server.engine.output import EngineCoreOutput, TokenLogprobs
from quire_server.engine.request import EngineRequest, FinishReason
from quire_server.shared.errors import QuireError, decode_error
from quire_server.shared.sampling_params import SamplingParams
from quire_server.tokens.detokenizer import Detokenizer
from quire_server.tokens.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""JSON has no minus infinity."""


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """One token of a distribution, ready to show."""

    token_id: int
    token: str
    """May hold U+FFFD where the token is not whole characters; `bytes` is exact."""
    bytes: bytes
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at a position, and the most likely ones, best first."""

    chosen: LogprobEntry
    top: tuple[LogprobEntry, ...]


class CompletionDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What was added to one completion, a branch of a request; the last one carries `finish_reason`.

    `text` may lag behind `token_ids` (an incomplete character, the possible beginning of a stop string); joined, the
    texts are the whole answer. A msgspec struct, as one is built for every token; the collector tracks it, because an
    error that was raised may refer to it again.
    """

    request_id: str
    branch: int = 0
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[PositionLogprobs] = ()
    """One per token of `token_ids`, where they were asked for."""
    prompt_logprobs: Sequence[PositionLogprobs] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for end-of-sequence."""
    num_output_tokens: int
    """Of the completion so far, this delta included."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache already held."""
    error: QuireError | None = None
    """With FinishReason.ERROR, which ends every branch: what to raise."""


class OutputProcessor:
    """Turns the outputs of one request into deltas, in order."""

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._branches: dict[int, _Branch] = {}
        self._num_finished = 0
        self._is_finished = False

    @property
    def is_finished(self) -> bool:
        """Whether every branch's last delta was made. True while the engine still runs: a stop string, so abort it."""
        return self._is_finished

    def process(self, output: EngineCoreOutput) -> CompletionDelta:
        """Return what this output adds. Must not be called for a branch whose last delta was made."""
        if not isinstance(self._request.params, SamplingParams):
            return self._process_pooled(output)
        branch = self._branches.get(output.branch)
        if branch is None:
            branch = self._branches[output.branch] = _Branch(self._tokenizer, self._request)
        assert not branch.is_finished or output.ends_request, (self._request.request_id, output.branch)
        # the end of the whole request may name a branch that has had its own
        text, num_taken, stop = branch.push(output) if not branch.is_finished else ("", 0, None)
        finish_reason = FinishReason.STOP if stop is not None else output.finish_reason
        branch.is_finished = finish_reason is not None
        self._num_finished += branch.is_finished
        self._is_finished = output.ends_request or self._num_finished == self._request.num_branches
        return CompletionDelta(
            request_id=self._request.request_id,
            branch=output.branch,
            text=text,
            token_ids=output.new_token_ids[:num_taken],
            logprobs=self._describe(output.logprobs[:num_taken]),
            prompt_logprobs=self._describe(output.prompt_logprobs),
            finish_reason=finish_reason,
            stop_reason=stop if stop is not None else output.stop_reason,
            num_output_tokens=branch.num_output_tokens,
            num_cached_tokens=output.num_cached_tokens,
            error=None if output.error is None else decode_error(output.error),
        )

    def _process_pooled(self, output: EngineCoreOutput) -> CompletionDelta:
        """Return the end of a request for a vector: until an engine makes some, it is refused or aborted."""
        assert output.ends_request, self._request.request_id
        self._is_finished = True
        return CompletionDelta(
            request_id=self._request.request_id,
            text="",
            token_ids=(),
            num_output_tokens=0,
            finish_reason=output.finish_reason,
            error=None if output.error is None else decode_error(output.error),
        )

    def _describe(self, positions: Sequence[TokenLogprobs]) -> Sequence[PositionLogprobs]:
        return [describe_logprobs(self._tokenizer, position) for position in positions] if positions else ()


class _Branch:
    """The text of one branch so far."""

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest) -> None:
        params = request.sampling_params
        self._include_stop = params.include_stop_str_in_output
        self._detokenizer: Detokenizer | None = None
        if params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer.text_source(request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens),
                stops=params.stop,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )
        self.num_output_tokens = 0
        self.is_finished = False

    def push(self, output: EngineCoreOutput) -> tuple[str, int, str | None]:
        """Return the text that an output adds, how many of its tokens count, and the stop string that was met."""
        text, num_taken, stop = self._text_of(output)
        self.num_output_tokens += num_taken
        return text, num_taken, stop

    def _text_of(self, output: EngineCoreOutput) -> tuple[str, int, str | None]:
        token_ids = output.new_token_ids
        detokenizer = self._detokenizer
        if detokenizer is None:
            return "", len(token_ids), None
        # A token that ended the sequence is no text, unless what stops is asked for.
        has_silent_end = output.finish_reason is FinishReason.STOP and not self._include_stop and bool(token_ids)
        text = detokenizer.push(token_ids[:-1] if has_silent_end else token_ids)
        if output.finish_reason is not None:
            text += detokenizer.finish()
        if detokenizer.stop is not None:
            return text, detokenizer.num_tokens - self.num_output_tokens, detokenizer.stop
        detokenizer.skip(int(has_silent_end))
        return text, len(token_ids), None


def describe_token(tokenizer: Tokenizer, token_id: int) -> LogprobEntry:
    """Show a token of which no log-probability is known: it has the neutral one, and no rank."""
    return _entry(tokenizer, token_id, 0.0, 0)


def describe_logprobs(tokenizer: Tokenizer, position: TokenLogprobs) -> PositionLogprobs:
    """Add the tokens' texts to one position's log-probabilities."""
    return PositionLogprobs(
        _entry(tokenizer, position.token_id, position.logprob, position.rank),
        tuple(
            _entry(tokenizer, token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(position.top, start=1)
        ),
    )


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float, rank: int) -> LogprobEntry:
    token_bytes = tokenizer.token_bytes(token_id)
    return LogprobEntry(token_id, token_bytes.decode(errors="replace"), token_bytes, max(logprob, MIN_LOGPROB), rank)
