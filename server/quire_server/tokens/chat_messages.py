"""Messages as chat templates read them: content as one string or as parts, tool arguments as objects or as text.

Owns the shapes; which of them a template reads is told by the caller. Copies, never changes, what clients sent.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quire_contract.nesting import bounded_nesting
from quire_server.shared.errors import InvalidRequestError

Message = Mapping[str, Any]

TEXT_PART_KINDS: Final = ("text", "input_text", "output_text")
"""Types of content parts that carry their text in `text`; a `refusal` carries it under its own name."""
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentShape:
    """What a template reads as a message's content."""

    goes_through_parts: bool
    tests_for_string: bool
    knows_null: bool

    def of(self, content: Any) -> str | list[Any] | None:
        """Return a content in this shape.

        A null stays null for a template that asks for it; the others would print the word, so they get an empty one.
        """
        needs_parts = self.goes_through_parts and not self.tests_for_string
        if content is None:
            return None if self.knows_null else [] if needs_parts else ""
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if needs_parts else content
        if not isinstance(content, Sequence):
            raise InvalidRequestError("A message's content must be a string or a list of parts.", param="messages")
        parts = [{"type": "text", "text": _text_of_part(part)} for part in content]
        return parts if self.goes_through_parts else "\n".join(part["text"] for part in parts)


def prepare_message(message: Message, shape: ContentShape) -> dict[str, Any]:
    """Copy a message into the shape that a template reads; fields other than the content lose their nulls."""
    prepared = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "content" in prepared:
        prepared["content"] = shape.of(prepared["content"])
    if prepared.get("tool_calls"):
        prepared["tool_calls"] = [_with_argument_object(call) for call in prepared["tool_calls"]]
    reasoning = next((prepared[name] for name in _REASONING_FIELDS if name in prepared), None)
    if reasoning is not None:
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    return prepared


def conversation_forms(prepared: list[dict[str, Any]], originals: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """Yield the forms in which a template may take prepared messages, the likeliest first.

    Some templates join tool arguments to a text (the client's own, where it sent text); some take no null for absent.
    """
    tried: list[list[dict[str, Any]]] = []
    for nulls in (prepared, [_without_null_content(message) for message in prepared]):
        texts = [_with_argument_texts(message, original) for message, original in zip(nulls, originals, strict=True)]
        for form in (nulls, texts):
            if form not in tried:
                tried.append(form)
                yield form


def _without_null_content(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _with_argument_texts(message: dict[str, Any], original: Message) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_argument_text(call) for call in original["tool_calls"]]}


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
    if kind not in (*TEXT_PART_KINDS, "refusal") or not isinstance(text, str):
        message = f"A content part of type {kind!r} is not supported; this model takes text."
        raise InvalidRequestError(message, param="messages")
    return text


def _with_argument_object(call: Any) -> Any:
    """Most templates read arguments as an object; clients send them as JSON in a string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        with bounded_nesting():
            arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        message = f"The arguments of a tool call are not JSON: {error}."
        raise InvalidRequestError(message, param="messages") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _with_argument_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return call
    arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
