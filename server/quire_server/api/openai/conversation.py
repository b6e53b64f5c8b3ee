"""From chat messages to the text that the model reads: checked here, field by field; shaped by the model's template."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from quire_contract.nesting import NestingError, bounded_nesting
from quire_server.api.openai.schemas.requests import ChatMessage, ContentPart, Tool, ToolCall
from quire_server.frontend.frontend import Frontend
from quire_server.frontend.text_lanes import LONG_CHARS
from quire_server.shared.errors import InvalidRequestError
from quire_server.tokens.chat_messages import TEXT_PART_KINDS
from quire_server.tokens.tokenizer import Tokenizer

_TEMPLATE_ARGUMENTS: Final = ("add_generation_prompt", "chat_template", "continue_final_message", "messages", "tools")
_RESERVED_KWARGS: Final = frozenset((*_TEMPLATE_ARGUMENTS, "documents", "self", "tokenize"))
_MAX_SHORT_MESSAGES: Final = 64
"""A template's loop costs something for each message, however short."""


async def render_conversation(
    frontend: Frontend,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_kwargs: Mapping[str, Any] | None,
    tools: Sequence[Tool] | None = None,
) -> str:
    """Render messages with the model's chat template.

    Raises:
        InvalidRequestError: a message or an option cannot be served, or the template refuses the conversation.
    """
    if continue_final_message and add_generation_prompt:
        message = "`continue_final_message` and `add_generation_prompt` cannot both be true."
        raise InvalidRequestError(message, param="continue_final_message")
    kwargs = dict(template_kwargs or {})
    for name in _RESERVED_KWARGS.intersection(kwargs):
        message = f"`chat_template_kwargs.{name}` cannot be set."
        raise InvalidRequestError(message, param=f"chat_template_kwargs.{name}")
    render = functools.partial(
        _render,
        frontend.tokenizer,
        messages,
        tools=_check_tools(tools or ()) or None,
        add_generation_prompt=not continue_final_message if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=bool(continue_final_message),
        **kwargs,
    )
    try:
        with bounded_nesting():
            return await frontend.lanes.run(_num_chars(messages, tools, kwargs), render)
    except NestingError as error:
        raise InvalidRequestError(f"The conversation cannot be rendered: {error}.", param="messages") from None


def _render(tokenizer: Tokenizer, messages: Sequence[ChatMessage], /, **options: Any) -> str:
    has_developer_role = "developer" in (tokenizer.chat_template or "")
    built = build_messages(messages, has_developer_role=has_developer_role)
    return tokenizer.apply_chat_template(built, **options)


def build_messages(messages: Sequence[ChatMessage], *, has_developer_role: bool) -> list[dict[str, Any]]:
    """Shape messages as chat templates expect them. A template without a developer role gets it as system."""
    if not messages:
        raise InvalidRequestError("`messages` must not be empty.", param="messages")
    built: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" and not has_developer_role else message.role
        texts = content_texts(message, f"messages[{index}].content")
        is_parts = isinstance(message.content, list)
        content = [{"type": "text", "text": text} for text in texts] if is_parts else message.content
        entry: dict[str, Any] = {"role": role, "content": content}
        for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                entry[name] = value
        calls = message.tool_calls or ([ToolCall(function=message.function_call)] if message.function_call else [])
        if calls:
            entry["tool_calls"] = msgspec.to_builtins(calls)
        built.append(entry)
    return built


def _check_tools(tools: Sequence[Tool]) -> Sequence[Tool]:
    """Return the tools, each of which has what every template asks of one."""
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            param = f"tools[{index}].function.name"
            raise InvalidRequestError(f"`{param}` is missing: a tool is a function with a name.", param=param)
    return tools


def content_texts(message: ChatMessage, param: str) -> list[str]:
    """Return the texts of a message's content: one, or one per part."""
    if message.content is None:
        if message.role != "assistant":
            raise InvalidRequestError(f"`{param}` is missing.", param=param)
        return []
    if isinstance(message.content, str):
        return [message.content]
    return [_part_text(part, f"{param}[{index}]") for index, part in enumerate(message.content)]


def _num_chars(messages: Sequence[ChatMessage], tools: Sequence[Tool] | None, kwargs: Mapping[str, Any]) -> int:
    """Estimate how much a template has to go through; it may go through calls, tools and its own variables too."""
    num_chars = sum(len(message.content) for message in messages if isinstance(message.content, str))
    if num_chars >= LONG_CHARS:
        return num_chars
    if len(messages) > _MAX_SHORT_MESSAGES:
        return LONG_CHARS
    return len(msgspec.json.encode((messages, tools, kwargs)))


def _part_text(part: str | ContentPart, param: str) -> str:
    if isinstance(part, str):
        return part
    if part.type not in (*TEXT_PART_KINDS, "refusal"):
        message = f"Content parts of type {part.type!r} are not supported by this model; only text is."
        raise InvalidRequestError(message, param=f"{param}.type")
    field = "refusal" if part.type == "refusal" else "text"
    text: str | None = getattr(part, field)
    if text is None:
        raise InvalidRequestError(f"`{param}.{field}` is missing.", param=f"{param}.{field}")
    return text
