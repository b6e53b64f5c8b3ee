"""What templates are given of null contents and of tool arguments, where they differ in what they read."""

import json
from typing import Any

import msgspec
import pytest

from quire_server.api.openai.conversation import build_messages
from quire_server.api.openai.schemas.requests import ChatMessage
from quire_server.tokens.chat_messages import Message
from quire_server.tokens.chat_template import ChatTemplate

ASKS_FOR_NULL = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {%- for tool in message['tool_calls'] %}
            {{- '<call>' + tool['function']['name'] + ' ' + tool['function']['arguments'] }}
        {%- endfor %}
    {%- else %}{{- '<' + message['role'] + '>' + message['content'] }}{%- endif %}
{%- endfor %}"""
"""DeepSeek R1's way: a null content marks the messages that call tools, and arguments are joined to the text."""
DUMPS_ARGUMENTS = """{%- for message in messages %}{{- message.role + ':' + message.content }}
    {%- for call in message.tool_calls or [] %}{{- call.function.arguments | tojson }}{%- endfor %}
{%- endfor %}"""
REFUSES_NULL = """{%- for message in messages %}
    {%- if message['content'] is none %}{{- raise_exception('null') }}{%- endif %}{{- message['content'] }}
{%- endfor %}"""

ARGUMENTS = {"city": "Köln", "days": 2}


def conversation(arguments: Any, content: str | None = None) -> list[Message]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content, "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ('{"city":"Köln"}', '{"city":"Köln"}'),  # the client's own spelling
        (ARGUMENTS, '{"city": "Köln", "days": 2}'),
        ("", ""),
    ],
)
def test_a_null_content_and_arguments_as_text_reach_the_template_that_reads_them(arguments: Any, printed: str) -> None:
    assert ChatTemplate(ASKS_FOR_NULL).render(conversation(arguments)) == f"<user>Hi<call>weather {printed}"


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)])
def test_a_template_that_prints_contents_never_prints_the_word_null(arguments: Any) -> None:
    rendered = ChatTemplate(DUMPS_ARGUMENTS).render(conversation(arguments))
    assert rendered == 'user:Hiassistant:{"city": "Köln", "days": 2}'


def test_a_template_that_refuses_null_gets_none() -> None:
    assert ChatTemplate(REFUSES_NULL).render(conversation(ARGUMENTS)) == "Hi"


@pytest.mark.parametrize(
    ("condition", "is_asked"),
    [
        ("message.content is none", True),
        ("message['content'] is not none", True),
        ("message.get('content') == none", True),
        ("none != message.content", True),
        ("message.tool_calls is none", False),
        ("message.content is string", False),
    ],
)
def test_templates_that_ask_for_null_are_given_it(condition: str, is_asked: bool) -> None:
    source = (
        f"{{% for message in messages %}}{{% if {condition} %}}{{% endif %}}{{{{ message.content }}}}{{% endfor %}}"
    )
    assert ChatTemplate(source).render(conversation(ARGUMENTS)) == ("HiNone" if is_asked else "Hi")


@pytest.mark.parametrize("arguments", ['{"city": "Köln", "days": 2}', "{}"])
def test_a_call_sent_over_http_reaches_a_template_that_asks_for_null(arguments: str) -> None:
    body = json.dumps(conversation(arguments)).encode()
    messages = msgspec.json.decode(body, type=list[ChatMessage])
    built = build_messages(messages, has_developer_role=False)
    assert ChatTemplate(ASKS_FOR_NULL).render(built) == f"<user>Hi<call>weather {arguments}"


def test_parts_by_get_are_found() -> None:
    source = "{% for m in messages %}{% for p in m.get('content') %}{{ p.text }}{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ChatTemplate(source).render([{"role": "user", "content": parts}]) == "ab"
    assert ChatTemplate(source).render([{"role": "user", "content": "ab"}, {"role": "user", "content": None}]) == "ab"
