"""What a chat template's source tells of how it reads a message's content: as parts, as one string, with null.

A template is judged by its syntax tree alone: nothing is rendered, so nothing can fail.
"""

from jinja2 import nodes


def iterates_content(syntax: nodes.Template) -> bool:
    """Tell whether the template goes through the parts of a content."""
    names = _content_names(syntax)
    return any(_is_content(loop.iter, names) for loop in syntax.find_all(nodes.For))


def tests_for_string(syntax: nodes.Template) -> bool:
    """Tell whether the template asks of anything whether it `is string`."""
    return any(test.name == "string" for test in syntax.find_all(nodes.Test))


def knows_null_content(syntax: nodes.Template) -> bool:
    """Tell whether the template asks if a content `is none`: how DeepSeek's finds the messages that only call tools."""
    names = _content_names(syntax)
    asked = any(test.name == "none" and _is_content(test.node, names) for test in syntax.find_all(nodes.Test))
    return asked or any(_compares_with_none(compare, names) for compare in syntax.find_all(nodes.Compare))


def _compares_with_none(compare: nodes.Compare, names: set[str]) -> bool:
    sides = [compare.expr, *(operand.expr for operand in compare.ops)]
    has_none = any(isinstance(side, nodes.Const) and side.value is None for side in sides)
    return has_none and any(_is_content(side, names) for side in sides)


def _content_names(syntax: nodes.Template) -> set[str]:
    """Names that stand for a message's content: set from it, or macro parameters it is passed to."""
    macros = {macro.name: macro for macro in syntax.find_all(nodes.Macro)}
    names: set[str] = set()
    while True:
        before = len(names)
        for assign in syntax.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
                names.add(assign.target.name)
        for call in syntax.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                names.update(
                    parameter.name
                    for parameter, argument in zip(macro.args, call.args, strict=False)
                    if _is_content(argument, names)
                )
        if len(names) == before:
            return names


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem():
            if isinstance(node.arg, nodes.Const):
                return bool(node.arg.value == "content")
            return isinstance(node.arg, nodes.Slice) and _is_content(node.node, names)
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]):
            return True
        case nodes.Filter():
            return _is_content(node.node, names)
        case nodes.CondExpr():
            return _is_content(node.expr1, names) or _is_content(node.expr2, names)
        case _:
            return False
