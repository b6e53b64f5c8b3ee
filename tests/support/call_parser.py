"""A parser of messages that does all that one may do, where the server's own has nothing to take apart."""

from quire_server.frontend.output_processor import CompletionDelta
from quire_server.generation.messages import ContentFragment, MessageDelta, MessageFinishReason

CALL = "<call>"


class CallParser:
    """Takes every `<call>` out of the text, holding back what may be the beginning of one, and ends with TOOL_CALLS."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._held = ""
        self._has_called = False

    def feed(self, delta: CompletionDelta) -> MessageDelta:
        self.token_ids += delta.token_ids
        is_last = delta.finish_reason is not None
        *shown, rest = (self._held + delta.text).split(CALL)
        self._has_called = self._has_called or bool(shown)
        num_open = next(size for size in range(len(CALL) - 1, -1, -1) if rest.endswith(CALL[:size]))
        end = len(rest) if is_last else len(rest) - num_open
        self._held = rest[end:]
        text = "".join([*shown, rest[:end]])
        return MessageDelta(
            completion=delta,
            fragments=[ContentFragment(text)] if text else [],
            finish_reason=self._finish_reason(delta),
        )

    def _finish_reason(self, delta: CompletionDelta) -> MessageFinishReason | None:
        if delta.finish_reason is None:
            return None
        return MessageFinishReason.TOOL_CALLS if self._has_called else MessageFinishReason(delta.finish_reason.value)
