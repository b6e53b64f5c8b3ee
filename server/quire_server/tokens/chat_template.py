"""Conversations to prompt text, by the Jinja template that a model was trained with.

Owns the sandbox, and what a conversation must look like for a template: content as one string or as parts, tool
arguments as objects, no nulls. Renders what `transformers.apply_chat_template` renders. Knows no tokens and no HTTP.
"""

import json
from collections.abc import Callable, Mapping, Sequence
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

from quire_contract.nesting import bounded_nesting
from quire_server.shared.errors import InvalidRequestError

Message = Mapping[str, Any]
ContentFormat = Literal["string", "parts"]

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
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
        return "parts" if _iterates_content(self._syntax) else "string"

    @cached_property
    def _tests_for_string(self) -> bool:
        return any(test.name == "string" for test in self._syntax.find_all(jinja2.nodes.Test))

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
        conversation = [self._prepare(message) for message in messages]
        if not conversation:
            raise InvalidRequestError("The conversation is empty.", param="messages")
        final_text = ""
        if continue_final_message:
            if add_generation_prompt:
                message = "continue_final_message and add_generation_prompt exclude each other."
                raise InvalidRequestError(message, param="continue_final_message")
            conversation[-1], final_text = _mark_final_message(conversation[-1])
        try:
            rendered = self._compiled.render(
                messages=conversation, tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        except RecursionError as error:
            raise InvalidRequestError("The chat template nests too deeply.", param="messages") from error
        except _TEMPLATE_FAULTS as error:
            raise InvalidRequestError(f"The chat template refuses this: {error}", param="messages") from error
        return _cut_at_mark(rendered, final_text) if continue_final_message else rendered

    def _prepare(self, message: Message) -> dict[str, Any]:
        """Copy a message into the shape that this template reads."""
        prepared = {key: value for key, value in message.items() if value is not None}
        if "content" in prepared:
            prepared["content"] = self._prepare_content(prepared["content"])
        if prepared.get("tool_calls"):
            prepared["tool_calls"] = [_prepare_tool_call(call) for call in prepared["tool_calls"]]
        reasoning = next((prepared[name] for name in _REASONING_FIELDS if name in prepared), None)
        if reasoning is not None:
            prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
        return prepared

    def _prepare_content(self, content: Any) -> str | list[Any]:
        if isinstance(content, str):
            needs_parts = self.content_format == "parts" and not self._tests_for_string
            return [{"type": "text", "text": content}] if needs_parts else content
        if not isinstance(content, Sequence):
            raise InvalidRequestError("A message's content must be a string or a list of parts.", param="messages")
        parts = [{"type": "text", "text": _text_of_part(part)} for part in content]
        return parts if self.content_format == "parts" else "\n".join(part["text"] for part in parts)


@lru_cache(maxsize=32)
def compile_chat_template(source: str) -> ChatTemplate:
    """Return the compiled template, from a cache."""
    return ChatTemplate(source)


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
        message = f"A content part of type {kind!r} is not supported; this model takes text."
        raise InvalidRequestError(message, param="messages")
    return text


def _prepare_tool_call(call: Any) -> Any:
    """Templates read arguments as an object; clients send them as JSON in a string."""
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


# ---- does a template go through the parts of a content? ----


def _iterates_content(syntax: jinja2.nodes.Template) -> bool:
    names = _content_names(syntax)
    return any(_is_content(loop.iter, names) for loop in syntax.find_all(jinja2.nodes.For))


def _content_names(syntax: jinja2.nodes.Template) -> set[str]:
    """Names that stand for a message's content: set from it, or macro parameters it is passed to."""
    macros = {macro.name: macro for macro in syntax.find_all(jinja2.nodes.Macro)}
    names: set[str] = set()
    while True:
        before = len(names)
        for assign in syntax.find_all(jinja2.nodes.Assign):
            if isinstance(assign.target, jinja2.nodes.Name) and _is_content(assign.node, names):
                names.add(assign.target.name)
        for call in syntax.find_all(jinja2.nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, jinja2.nodes.Name) else None
            if macro is not None:
                names.update(
                    parameter.name
                    for parameter, argument in zip(macro.args, call.args, strict=False)
                    if _is_content(argument, names)
                )
        if len(names) == before:
            return names


def _is_content(node: jinja2.nodes.Node | None, names: set[str]) -> bool:
    match node:
        case jinja2.nodes.Name():
            return node.name in names
        case jinja2.nodes.Getattr():
            return node.attr == "content"
        case jinja2.nodes.Getitem():
            if isinstance(node.arg, jinja2.nodes.Const):
                return bool(node.arg.value == "content")
            return isinstance(node.arg, jinja2.nodes.Slice) and _is_content(node.node, names)
        case jinja2.nodes.Filter():
            return _is_content(node.node, names)
        case jinja2.nodes.CondExpr():
            return _is_content(node.expr1, names) or _is_content(node.expr2, names)
        case _:
            return False
