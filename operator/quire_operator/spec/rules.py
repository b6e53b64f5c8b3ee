"""CEL rules (`x-kubernetes-validations`) of a structural schema, evaluated as an API server would on creation.

The rules live in the CRD alone. This module knows how to run them: `self`, `fieldPath`, `messageExpression`, and
`oldSelf` of rules with `optionalOldSelf`, which has no value here. Other rules about `oldSelf` do not apply to a
creation and are passed over. Expressions are compiled once per process.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from quire_operator.spec.schema import Problem, Schema, children


def find_rule_problems(value: Any, schema: Schema, path: str = "") -> Iterator[Problem]:
    """Yield the rules that a value breaks, outermost first. The value must be free of blocking problems."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" in rule["rule"] and not rule.get("optionalOldSelf"):
            continue
        if not _holds(rule["rule"], value):
            yield Problem(_join(path, rule.get("fieldPath", "")), _message(rule, value))
    for child, child_schema, child_path in children(value, schema, path):
        yield from find_rule_problems(child, child_schema, child_path)


def _holds(expression: str, value: Any) -> bool:
    """Evaluate a rule. One that cannot be evaluated is broken, as it is for an API server."""
    from celpy.evaluation import CELEvalError

    try:
        return bool(_evaluate(expression, value))
    except CELEvalError:
        return False


def _message(rule: dict[str, Any], value: Any) -> str:
    from celpy.evaluation import CELEvalError

    message: str = rule["message"]
    if "messageExpression" not in rule:
        return message
    try:
        return str(_evaluate(rule["messageExpression"], value)) or message
    except CELEvalError:
        return message


def _join(path: str, relative: str) -> str:
    return f"{path}{relative}" if path else relative.removeprefix(".")


def _evaluate(expression: str, value: Any) -> Any:
    from celpy.adapter import json_to_cel

    return _program(expression).evaluate({"self": json_to_cel(value), "oldSelf": None})


@cache
def _program(expression: str) -> Any:
    import celpy
    from celpy.celtypes import BoolType, StringType

    def format_(template: str, arguments: list[Any]) -> StringType:
        """Kubernetes' string extension: %d and %s."""
        plain = tuple(int(a) if isinstance(a, int) else str(a) for a in arguments)
        return StringType(str(template) % plain)

    functions: dict[str, Any] = {"format": format_, "hasValue": lambda optional: BoolType(optional is not None)}
    environment = celpy.Environment()
    return environment.program(environment.compile(expression), functions=functions)
