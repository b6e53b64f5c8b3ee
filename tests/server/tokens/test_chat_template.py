"""Rendered prompts against `transformers.apply_chat_template`, for templates that models ship."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire_server.shared.errors import InvalidRequestError
from quire_server.tokens.chat_template import ChatTemplate, compile_chat_template
from quire_server.tokens.tokenizer import load_tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" %}{%- set ns.last_query_index = messages|length - 1 - loop.index0 %}{%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content if message.content is string else '' %}
        {%- generation %}
        {{- '<|im_start|>' + message.role }}
        {%- if loop.index0 > ns.last_query_index and message.reasoning_content %}
            {{- '\\n<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n' }}
        {%- endif %}
        {{- '\\n' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
PARTS_ONLY = (
    "{% for message in messages %}{{ message.role }}:"
    "{% for part in message.content %}[{{ part.text }}]{% endfor %};{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "qwen3": QWEN3}

USER = {"role": "user", "content": 'What\'s 1 < 2 & "so" <on>?  \n é 日本'}
TURNS = [USER, {"role": "assistant", "content": " Yes. "}, {"role": "user", "content": "Sure?"}]
SYSTEM = {"role": "system", "content": "Be terse.\n"}
CALL = {"name": "weather", "arguments": {"city": "Köln", "days": 2}}
TOOL_TURNS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny <25°>"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "<b>", "parameters": {"type": "object", "properties": {}}},
    }
]


@pytest.fixture(scope="module")
def reference(byte_level_dir: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(byte_level_dir)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([USER], {}),
        ([USER], {"add_generation_prompt": False}),
        (TURNS, {}),
        ([SYSTEM, *TURNS], {}),
        ([SYSTEM, USER], {"tools": TOOLS}),
        ([USER, {**TOOL_TURNS[1], "content": ""}, TOOL_TURNS[2]], {"tools": TOOLS}),
        ([USER], {"enable_thinking": False, "date_string": "1 Jan 2030"}),
        (TURNS[:2], {"continue_final_message": True, "add_generation_prompt": False}),
        ([USER, {"role": "assistant", "content": "x", "reasoning": "Hm."}], {"add_generation_prompt": False}),
    ],
)
def test_renders_as_transformers(
    byte_level_dir: Path, reference: Any, name: str, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    options = {"add_generation_prompt": True, **options}
    tokenizer = load_tokenizer(byte_level_dir, chat_template=TEMPLATES[name])
    expected = render_or_complain(
        lambda: reference.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **options)
    )
    actual = render_or_complain(lambda: tokenizer.apply_chat_template(messages, **options))
    assert actual.removeprefix("The chat template refuses this: ") == expected


def render_or_complain(render: Callable[[], str]) -> str:
    from jinja2 import TemplateError

    try:
        return render()
    except (TemplateError, TypeError, InvalidRequestError) as error:
        return str(error)


def test_mistral_refuses_a_system_message_in_its_own_words() -> None:
    with pytest.raises(InvalidRequestError, match="Conversation roles must alternate") as caught:
        ChatTemplate(MISTRAL).render([SYSTEM, USER], bos_token="<s>")
    assert caught.value.param == "messages"


def test_tool_arguments_in_a_string_become_an_object() -> None:
    as_object = ChatTemplate(QWEN3).render(TOOL_TURNS)
    call = {"function": {"name": "weather", "arguments": json.dumps(CALL["arguments"])}}
    as_string = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, TOOL_TURNS[2]]
    assert ChatTemplate(QWEN3).render(as_string) == as_object
    assert '"arguments": {"city": "Köln", "days": 2}' in as_object
    call["function"]["arguments"] = '{"city": '
    with pytest.raises(InvalidRequestError, match="not JSON"):
        ChatTemplate(QWEN3).render(as_string)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, "string"),
        (LLAMA3, "string"),
        (MISTRAL, "string"),
        (QWEN3, "string"),
        (GEMMA, "parts"),
        (PARTS_ONLY, "parts"),
        ("{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{{ p }}{% endfor %}{% endfor %}", "parts"),
        (
            "{% macro show(c) %}{% for p in c %}{{ p }}{% endfor %}{% endmacro %}{{ show(messages[0].content) }}",
            "parts",
        ),
        ("{% for m in messages %}{% for p in m.content | reverse %}{{ p }}{% endfor %}{% endfor %}", "parts"),
        ("{% for m in messages %}{% for c in m.tool_calls %}{{ c }}{% endfor %}{{ m.content }}{% endfor %}", "string"),
    ],
)
def test_templates_that_go_through_parts_are_told_from_those_that_print(source: str, expected: str) -> None:
    assert ChatTemplate(source).content_format == expected


def test_parts_become_what_the_template_reads() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": parts}]) == "one\ntwo"
    assert ChatTemplate(PARTS_ONLY).render([{"role": "user", "content": parts}]) == "user:[one][two];"
    assert ChatTemplate(PARTS_ONLY).render([{"role": "user", "content": "one"}]) == "user:[one];"
    assert "one" in ChatTemplate(GEMMA).render([{"role": "user", "content": "one"}])


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, 7])
def test_parts_that_are_no_text_are_refused(part: Any) -> None:
    with pytest.raises(InvalidRequestError, match="not supported"):
        ChatTemplate(CHATML).render([{"role": "user", "content": [part]}])


def test_a_message_in_parts_can_be_continued() -> None:
    messages = [USER, {"role": "assistant", "content": [{"type": "text", "text": "Once upon"}]}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert ChatTemplate(CHATML).render(messages, **options).endswith("<|im_start|>assistant\nOnce upon")
    assert ChatTemplate(PARTS_ONLY).render(messages, **options).endswith("assistant:[Once upon")


@pytest.mark.parametrize(
    ("messages", "options", "match"),
    [
        ([], {}, "empty"),
        ([USER], {"continue_final_message": True}, "exclude each other"),
        ([{"role": "assistant"}], {"continue_final_message": True, "add_generation_prompt": False}, "has content"),
        ([USER], {"messages_": 1, "tools": None, "add_generation_prompt": True}, None),
        ([{"role": "user", "content": 5}], {}, "string or a list"),
    ],
)
def test_malformed_conversations(messages: list[Any], options: dict[str, Any], match: str | None) -> None:
    if match is None:
        assert ChatTemplate(CHATML).render(messages, **options)
        return
    with pytest.raises(InvalidRequestError, match=match):
        ChatTemplate(CHATML).render(messages, **options)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ undefined_thing.field }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_can_only_fail_the_request(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source).render([USER])


def test_a_template_that_is_no_template() -> None:
    with pytest.raises(InvalidRequestError, match=r"not valid Jinja.*line 2"):
        compile_chat_template("a\n{% for %}")


def test_a_model_without_a_template_says_so(byte_level_dir: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"no chat template.*--chat-template"):
        load_tokenizer(byte_level_dir).apply_chat_template([USER])


def test_where_templates_come_from(byte_level_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template([USER]) == "plain"
    assert tokenizer.apply_chat_template([USER], tools=TOOLS) == "with tools"
    assert tokenizer.apply_chat_template([USER], chat_template="mine") == "mine"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_template == "from the file"
    assert load_tokenizer(tmp_path, chat_template="from the flag").chat_template == "from the flag"


def test_special_tokens_and_clock_are_there(byte_level_dir: Path) -> None:
    template = "{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y') | int > 2000 }}"
    assert load_tokenizer(byte_level_dir, chat_template=template).apply_chat_template([USER]) == "<s><|im_end|>True"
