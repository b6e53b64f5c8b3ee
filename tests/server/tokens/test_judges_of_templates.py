"""Seventy templates that models ship, rendered as `transformers` renders them."""

import json
from collections.abc import Callable
from typing import Any

import jinja2
import judges
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from quire_server.shared.errors import InvalidRequestError
from quire_server.tokens.chat_template import ChatTemplate

TEMPLATES = judges.names("llama.cpp/models/templates/*.jinja")
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
PRINTS_NULL = ("LFM2-8B-A1B.jinja", "LFM2.5-Instruct.jinja")
"""Dump whatever is no string: `transformers` prints the word null, or refuses the message without a content."""

Message = dict[str, Any]
USER: Message = {"role": "user", "content": "Hi é <b>"}
SYSTEM: Message = {"role": "system", "content": "Be terse."}
ARGUMENTS = {"city": "Köln", "days": 2}
CALL: Message = {"id": "c12345678", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
RESULT: Message = {"role": "tool", "tool_call_id": "c12345678", "name": "weather", "content": "sunny <25°>"}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tell <b>", "parameters": CITY}}]
NULLS = {"refusal": None, "function_call": None, "audio": None, "reasoning_content": None}


def assistant(content: str | None, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


CONVERSATIONS: dict[str, tuple[list[Message], dict[str, Any]]] = {
    "one question": ([USER], {}),
    "no generation prompt": ([USER], {"add_generation_prompt": False}),
    "several turns": ([SYSTEM, USER, assistant(" Yes. "), USER], {}),
    "a developer": ([{"role": "developer", "content": "Be terse."}, USER], {}),
    "tools": ([SYSTEM, USER], {"tools": TOOLS}),
    "a call": ([USER, assistant("", tool_calls=[CALL]), RESULT], {"tools": TOOLS}),
    "a call with text": ([USER, assistant("Let me see.", tool_calls=[CALL]), RESULT, assistant("It is."), USER], {}),
    "a call with null": ([USER, assistant(None, tool_calls=[CALL]), RESULT], {"tools": TOOLS}),
    "two calls": ([USER, assistant(None, tool_calls=[CALL, CALL]), RESULT, RESULT], {"tools": TOOLS}),
    "a client's dump": ([USER, assistant("x", tool_calls=None, **NULLS), USER], {}),
    "reasoning": ([USER, assistant("x", reasoning_content="Hm."), USER], {}),
    "no thinking": ([USER], {"enable_thinking": False}),
    "to be continued": (
        [USER, assistant("Once upon")],
        {"add_generation_prompt": False, "continue_final_message": True},
    ),
}


def with_arguments_as_text(messages: list[Message]) -> list[Message]:
    """As clients send them."""
    text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(ARGUMENTS, ensure_ascii=False)}}
    return [{**message, "tool_calls": [text] * len(message["tool_calls"])} if message.get("tool_calls") else message
            for message in messages]  # fmt: skip


def without_nulls(messages: list[Message]) -> list[Message]:
    """As `transformers` has dropped them of late; before, templates were given them."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def rendered_or_none(render: Callable[..., str], *args: Any, **options: Any) -> str | None:
    try:
        return render(*args, **options)
    except (jinja2.TemplateError, InvalidRequestError, TypeError, ValueError, AttributeError, LookupError):
        return None


def render_as_transformers(source: str, messages: list[Message], **options: Any) -> str:
    options = {"add_generation_prompt": True, **options, **SPECIAL_TOKENS}
    return str(render_jinja_template([messages], chat_template=source, **options)[0][0])


def distinct(*forms: list[Message]) -> list[list[Message]]:
    return [form for index, form in enumerate(forms) if form not in forms[:index]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str) -> None:
    source = judges.read(name).decode()
    template = ChatTemplate(source)
    for conversation, (messages, options) in CONVERSATIONS.items():
        texts, bare = with_arguments_as_text(messages), without_nulls(messages)
        forms = distinct(messages, texts, bare, with_arguments_as_text(bare))
        expected = {rendered_or_none(render_as_transformers, source, form, **options) for form in forms} - {None}
        if name.endswith(PRINTS_NULL):
            expected |= {text.replace("assistant\nnull", "assistant\n") for text in expected if text}
        for given in distinct(messages, texts):
            actual = rendered_or_none(template.render, given, **SPECIAL_TOKENS, **options)
            assert actual in expected or not expected, conversation


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "DeepSeek-R1-Distill" in name])
def test_deepseeks_templates_keep_a_call_without_content(name: str) -> None:
    template = ChatTemplate(judges.read(name).decode())
    conversation = [USER, assistant(None, tool_calls=[CALL])]
    for given in (conversation, with_arguments_as_text(conversation)):
        rendered = template.render(given, bos_token="")
        assert 'weather\n```json\n{"city": "Köln", "days": 2}\n```' in rendered
