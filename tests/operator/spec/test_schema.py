"""Defaults and checks of structural schemas, on small schemas; the CRD's own are in `verdicts/`."""

from collections.abc import Iterator
from typing import Any

import pytest

from quire_contract.crd import load_schema
from quire_operator.spec.schema import KEYWORDS, find_problems, with_defaults

NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "object", "default": {}, "properties": {"b": {"type": "integer", "default": 1}}},
        "c": {"type": "object", "properties": {"d": {"type": "string", "default": "x"}}},
        "list": {
            "type": "array",
            "items": {"type": "object", "properties": {"e": {"type": "boolean", "default": True}}},
        },
        "map": {"type": "object", "additionalProperties": {"type": "string"}},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    },
}


def _schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for child in [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]:
        if child is not None:
            yield from _schemas(child)


def test_the_crd_uses_no_keyword_that_is_not_checked() -> None:
    used = {keyword for schema in _schemas(load_schema()) for keyword in schema}
    assert used <= KEYWORDS


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({}, {"a": {"b": 1}}),
        ({"a": None}, {"a": {"b": 1}}),
        ({"a": {"b": None}}, {"a": {"b": 1}}),
        ({"a": {"b": 2.0}}, {"a": {"b": 2}}),
        ({"c": None}, {"a": {"b": 1}}),
        ({"c": {}}, {"a": {"b": 1}, "c": {"d": "x"}}),
        ({"list": [{}, {"e": False}, None]}, {"a": {"b": 1}, "list": [{"e": True}, {"e": False}, None]}),
        ({"map": {"k": None, "l": "v"}}, {"a": {"b": 1}, "map": {"l": "v"}}),
        ({"free": {"k": None, "l": {"m": 1}}}, {"a": {"b": 1}, "free": {"k": None, "l": {"m": 1}}}),
        ({"new": 1}, {"a": {"b": 1}, "new": 1}),
    ],
)
def test_defaults_are_filled_level_by_level_and_nulls_dropped(given: dict[str, Any], stored: dict[str, Any]) -> None:
    assert with_defaults(given, NESTED) == stored


def test_pruning_drops_unknown_fields_except_where_they_are_kept() -> None:
    given = {"new": 1, "a": {"new": 1}, "list": [{"new": 1}], "map": {"k": "v"}, "free": {"k": 1}}
    assert with_defaults(given, NESTED, is_pruning=True) == {
        "a": {"b": 1},
        "list": [{"e": True}],
        "map": {"k": "v"},
        "free": {"k": 1},
    }


def test_a_stored_default_is_nobody_elses() -> None:
    first = with_defaults({}, NESTED)
    first["a"]["b"] = 2
    assert with_defaults({}, NESTED) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("schema", "value", "messages"),
    [
        ({"type": "integer"}, True, ["must be an integer"]),
        ({"type": "number"}, 1, []),
        ({"type": "number"}, "1", ["must be a number"]),
        ({"type": "integer", "minimum": 1, "maximum": 3}, 4, ["must be at most 3"]),
        ({"type": "number", "minimum": 0}, -0.5, ["must be at least 0"]),
        ({"type": "string", "minLength": 3}, "ab", ["must be at least 3 characters long"]),
        ({"type": "string", "maxLength": 2}, "日本", []),
        ({"type": "string", "pattern": "^a+$"}, "b", ["must match ^a+$"]),
        ({"type": "string", "format": "date-time"}, "2026-01-31T12:00:00+01:00", []),
        ({"type": "string", "format": "date-time"}, "2026-01-31", ["must be a time such as 2026-01-31T12:00:00Z"]),
        ({"type": "array", "minItems": 2, "items": {"type": "string"}}, ["a"], ["must have at least 2 items"]),
        ({"type": "array", "x-kubernetes-list-type": "set"}, [1, 2, 1], ["must not repeat 1"]),
        ({"type": "object", "properties": {}}, {"anything": 1}, ["unknown field"]),
    ],
)
def test_find_problems(schema: dict[str, Any], value: Any, messages: list[str]) -> None:
    assert [problem.message for problem in find_problems(value, schema)] == messages


def test_only_types_absence_and_length_block_the_rules() -> None:
    schema = {
        "type": "object",
        "required": ["gone"],
        "maxProperties": 3,
        "properties": {
            "long": {"type": "string", "maxLength": 1},
            "many": {"type": "array", "maxItems": 0},
            "low": {"type": "integer", "minimum": 1},
            "kind": {"type": "string", "enum": ["a"]},
        },
    }
    value = {"long": "ab", "many": [1], "low": 0, "kind": "b", "new": 1}
    blocking = {problem.path: problem.is_blocking for problem in find_problems(value, schema)}
    assert blocking == {
        **dict.fromkeys(("", "gone", "long", "many"), True),
        **dict.fromkeys(("low", "kind", "new"), False),
    }
