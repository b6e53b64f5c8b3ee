"""Text from token ids, a few at a time: UTF-8 is never split, and a stop string never leaks, not even its beginning.

Each token costs O(1) amortised, whatever was said before. Knows nothing of requests, the engine or HTTP.
Invariants: the deltas, joined, are the text of all the tokens (cut at the stop string, where one was met); text once
given is never taken back.
"""

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol


class TextSource(Protocol):
    """Turns consecutive tokens of one output into text, keeping back what is not complete yet."""

    def push(self, token_ids: Iterable[int]) -> str: ...

    def flush(self) -> str:
        """Give what was kept back; an incomplete character becomes U+FFFD."""
        ...


class BytesTextSource:
    """Tokens whose bytes are known in advance: byte-level BPE, and SentencePiece with byte fallback."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        skipped_ids: frozenset[int] = frozenset(),
        strip_first_space: bool = False,
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped_ids = skipped_ids
        self._strip_first_space = strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        table, skipped = self._token_bytes, self._skipped_ids
        return self._decode(b"".join([table[i] for i in token_ids if i not in skipped and 0 <= i < len(table)]))

    def flush(self) -> str:
        return self._decode(b"", is_final=True)

    def _decode(self, encoded: bytes, *, is_final: bool = False) -> str:
        if self._strip_first_space and encoded:
            self._strip_first_space = False
            encoded = encoded.removeprefix(b" ")
        return self._decoder.decode(encoded, is_final)


class DecodeWindow(Protocol):
    def __call__(self, token_ids: Sequence[int]) -> str: ...


class WindowTextSource:
    """Tokens of any other tokenizer: decodes a short window twice and takes the difference.

    The window starts where the text last settled, so its length is that of one word, not of the output.
    """

    def __init__(self, decode: DecodeWindow, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context)
        self._num_read = len(self._ids)  # tokens whose text was given

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[: self._num_read])
        after = self._decode(self._ids)
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        del self._ids[: self._num_read]
        self._num_read = len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        before = self._decode(self._ids[: self._num_read])
        self._num_read = len(self._ids)
        return self._decode(self._ids)[len(before) :]


class StopMatch(NamedTuple):
    """Where a stop string was met, as offsets into the text pushed last; `start` is negative if it began earlier."""

    start: int
    end: int
    stop: str


class _StopAutomaton:
    """Knuth-Morris-Pratt over a stream: how many characters of one stop string the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._failure = _borders(stop)

    def push(self, text: str, may_stop: bool) -> int:
        """Advance over the text; return the offset after the first complete match, or -1."""
        stop, failure, matched = self.stop, self._failure, self.num_matched
        i = 0
        while i < len(text):
            if matched == 0:
                i = text.find(stop[0], i)
                if i < 0:
                    break
            while matched and text[i] != stop[matched]:
                matched = failure[matched]
            matched += text[i] == stop[matched]
            i += 1
            if matched == len(stop):
                if may_stop:
                    return i
                matched = failure[matched]
        self.num_matched = matched
        return -1


@lru_cache(maxsize=4096)
def _borders(stop: str) -> Sequence[int]:
    """Return, at [i], the longest proper border of stop[:i]. From a cache, as every choice of a request asks anew."""
    borders = [0] * (len(stop) + 1)
    border = 0
    for i in range(1, len(stop)):
        while border and stop[i] != stop[border]:
            border = borders[border]
        border += stop[i] == stop[border]
        borders[i + 1] = border
    return borders


class StopMatcher:
    """Finds the first stop string to complete in a text that arrives in pieces (of several at once, the longest)."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._automata = [_StopAutomaton(stop) for stop in stops]

    def push(self, text: str, *, may_stop: bool = True) -> StopMatch | None:
        """Advance over the text. With `may_stop` false a complete match is let through."""
        match: StopMatch | None = None
        for automaton in self._automata:
            end = automaton.push(text, may_stop)
            if end >= 0 and (match is None or (end, end - len(automaton.stop)) < (match.end, match.start)):
                match = StopMatch(end - len(automaton.stop), end, automaton.stop)
        return match

    @property
    def num_held(self) -> int:
        """How many of the last characters may yet turn out to begin a stop string."""
        return max((automaton.num_matched for automaton in self._automata), default=0)


class Detokenizer:
    """The text of one output.

    With `include_stop` the stop string ends the text and nothing is held back; without, the text ends right before it.
    The first `min_tokens` tokens cannot complete a stop string.
    """

    def __init__(
        self, source: TextSource, *, stops: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._source = source
        self._matcher = StopMatcher(stops) if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held = ""  # pushed, not given: may begin a stop string
        self.num_tokens = 0
        self.stop: str | None = None
        """The stop string that ended the text."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens add; `num_tokens` counts up to the one that met a stop string."""
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            return self._source.push(token_ids)
        given: list[str] = []
        for token_id in token_ids:
            if self.stop is not None:
                break
            self.num_tokens += 1
            given.append(self._take(self._source.push((token_id,)), self._matcher))
        return "".join(given)

    def skip(self, num_tokens: int) -> None:
        """Count tokens that have no text, such as the one that ended the sequence."""
        self.num_tokens += num_tokens

    def finish(self) -> str:
        """Return what was held back, at the end of the output."""
        if self.stop is not None:
            return ""
        rest = self._source.flush()
        if self._matcher is not None:
            rest = self._take(rest, self._matcher)
        rest, self._held = (rest + self._held) if self.stop is None else rest, ""
        return rest

    def _take(self, text: str, matcher: StopMatcher) -> str:
        if not text:
            return ""
        match = matcher.push(text, may_stop=self.num_tokens > self._min_tokens)
        held, self._held = self._held, ""
        whole = held + text
        if match is not None:
            self.stop = match.stop
            return whole[: len(held) + (match.end if self._include_stop else match.start)]
        num_held = 0 if self._include_stop else matcher.num_held
        num_given = len(whole) - num_held
        self._held = whole[num_given:]
        return whole[:num_given]
