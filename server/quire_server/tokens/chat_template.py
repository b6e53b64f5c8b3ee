"""Conversations to prompt text, by the Jinja template that a model was trained with.

Owns the sandbox and the order in which a conversation's forms are tried. Renders what
`transformers.apply_chat_template` renders. Knows no tokens and no HTTP.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, Literal

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from quire_server.shared.errors import InvalidRequestError
from quire_server.tokens.chat_messages import ContentShape, Message, conversation_forms, prepare_message
from quire_server.tokens.template_syntax import iterates_content, knows_null_content, tests_for_string

ContentFormat = Literal["string", "parts"]

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant wrote, for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace()`, without names that lead into Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace() takes no name that starts with an underscore: {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a model was not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _build_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
    return environment


_environment = _build_environment()


class ChatTemplate:
    """One compiled template.

    Raises:
        InvalidRequestError: the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._compiled = _environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidRequestError(
                f"The chat template is not valid Jinja: {error} (line {error.lineno}).", param="chat_template"
            ) from error

    @cached_property
    def _syntax(self) -> jinja2.nodes.Template:
        return _environment.parse(self.source)

    @cached_property
    def content_format(self) -> ContentFormat:
        """`parts` if the template goes through a message's content, `string` if it prints it."""
        return "parts" if self._shape.goes_through_parts else "string"

    @cached_property
    def _shape(self) -> ContentShape:
        return ContentShape(
            goes_through_parts=iterates_content(self._syntax),
            tests_for_string=tests_for_string(self._syntax),
            knows_null=knows_null_content(self._syntax),
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Render a conversation. `variables` are whatever else the template reads (special tokens, its own switches).

        Raises:
            InvalidRequestError: the conversation is malformed, or the template refuses it; says why.
        """
        if reserved := _RESERVED & variables.keys():
            raise InvalidRequestError(f"{min(reserved)!r} cannot be set here.", param="chat_template_kwargs")
        conversation = [prepare_message(message, self._shape) for message in messages]
        if not conversation:
            raise InvalidRequestError("The conversation is empty.", param="messages")
        final_text = ""
        if continue_final_message:
            if add_generation_prompt:
                message = "continue_final_message and add_generation_prompt exclude each other."
                raise InvalidRequestError(message, param="continue_final_message")
            conversation[-1], final_text = _mark_final_message(conversation[-1])
        forms = conversation_forms(conversation, messages)
        rendered = self._render_first(
            forms, {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        )
        return _cut_at_mark(rendered, final_text) if continue_final_message else rendered

    def _render_first(self, forms: Iterable[list[dict[str, Any]]], variables: Mapping[str, Any]) -> str:
        """Render the first form of a conversation that the template takes; report its complaint about the first."""
        fault: Exception | None = None
        for messages in forms:
            try:
                return self._compiled.render(messages=messages, **variables)
            except RecursionError as error:
                raise InvalidRequestError("The chat template nests too deeply.", param="messages") from error
            except _TEMPLATE_FAULTS as error:
                fault = fault or error
        raise InvalidRequestError(f"The chat template refuses this: {fault}", param="messages") from fault


@lru_cache(maxsize=32)
def compile_chat_template(source: str) -> ChatTemplate:
    """Return the compiled template, from a cache."""
    return ChatTemplate(source)


def _mark_final_message(message: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Append a mark to the final message's text; return the marked message and the text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _CONTINUE_MARK}, content
    if content:
        *others, last = content
        return {**message, "content": [*others, {**last, "text": last["text"] + _CONTINUE_MARK}]}, last["text"]
    message_text = "continue_final_message needs a final message that has content."
    raise InvalidRequestError(message_text, param="continue_final_message")


def _cut_at_mark(rendered: str, final_text: str) -> str:
    """Return the prompt up to the end of the final message."""
    position = rendered.rfind(_CONTINUE_MARK.strip())
    if position < 0 or final_text.strip() not in rendered:
        message = "The chat template does not render the final message as it stands, so it cannot be continued."
        raise InvalidRequestError(message, param="continue_final_message")
    prompt = rendered[:position]
    return prompt if rendered.startswith(_CONTINUE_MARK, position) else prompt.rstrip()
