"""How CEL rules are run: paths, messages, and what becomes of a rule that cannot be evaluated."""

from typing import Any

import pytest

from quire_operator.spec.rules import find_rule_problems


def _problems(rule: dict[str, Any], value: Any, path: str = "spec") -> list[tuple[str, str]]:
    schema = {"type": "object", "x-kubernetes-validations": [{"message": "broken", **rule}]}
    return [(problem.path, problem.message) for problem in find_rule_problems(value, schema, path)]


@pytest.mark.parametrize(
    ("rule", "value", "problems"),
    [
        ({"rule": "self.a < self.b"}, {"a": 1, "b": 2}, []),
        ({"rule": "self.a < self.b"}, {"a": 2, "b": 1}, [("spec", "broken")]),
        ({"rule": "self.a < self.b", "fieldPath": ".a"}, {"a": 2, "b": 1}, [("spec.a", "broken")]),
        (
            {"rule": "self.a < self.b", "messageExpression": "'%d is not < %d'.format([self.a, self.b])"},
            {"a": 2, "b": 1},
            [("spec", "2 is not < 1")],
        ),
        ({"rule": "false", "messageExpression": "self.gone"}, {}, [("spec", "broken")]),
        ({"rule": "self.gone == 1"}, {}, [("spec", "broken")]),
        ({"rule": "duration(self.d) > duration('1s')"}, {"d": "soon"}, [("spec", "broken")]),
        ({"rule": "duration(self.d) > duration('1s')"}, {"d": "1h30m"}, []),
        ({"rule": "self.a == oldSelf.a"}, {"a": 1}, []),
        ({"rule": "oldSelf.hasValue()", "optionalOldSelf": True}, {"a": 1}, [("spec", "broken")]),
    ],
)
def test_one_rule(rule: dict[str, Any], value: Any, problems: list[tuple[str, str]]) -> None:
    assert _problems(rule, value) == problems


def test_a_rule_at_the_root_names_a_field_without_a_dot() -> None:
    assert _problems({"rule": "false", "fieldPath": ".metadata.name"}, {}, path="") == [("metadata.name", "broken")]


def test_rules_of_fields_items_and_entries_are_found() -> None:
    leaf = {"type": "integer", "x-kubernetes-validations": [{"rule": "self > 0", "message": "low"}]}
    schema = {
        "type": "object",
        "properties": {
            "list": {"type": "array", "items": leaf},
            "map": {"type": "object", "additionalProperties": leaf},
        },
    }
    value = {"list": [1, 0], "map": {"a/b": -1}, "unknown": 0}
    assert [problem.path for problem in find_rule_problems(value, schema, "spec")] == ["spec.list[1]", "spec.map[a/b]"]
