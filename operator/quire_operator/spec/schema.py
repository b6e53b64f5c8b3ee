"""Kubernetes structural schemas: defaults, and the checks that an API server makes before any CEL rule.

Knows nothing of LLMDeployments. Covers the keywords that our CRD uses (`KEYWORDS`; a test holds the CRD to them) and
behaves as `apiextensions-apiserver` does: nulls are dropped where a field cannot be null, defaults are filled in level
by level, and what has the wrong type, is missing or is too long keeps rules from being tried at all.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

Schema = Mapping[str, Any]

KEYWORDS: Final = frozenset(
    (
        *(
            "type",
            "format",
            "description",
            "default",
            "enum",
            "pattern",
            "minimum",
            "maximum",
            "minLength",
            "maxLength",
        ),
        *("minItems", "maxItems", "maxProperties", "required", "properties", "additionalProperties", "items"),
        *("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations"),
        *("x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    )
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a document, and where: `spec.scaling.min`."""

    path: str
    message: str
    is_blocking: bool = False
    """Rules are not tried on a document with such a problem: they could only fail for the same reason."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def with_defaults(value: Any, schema: Schema, *, is_pruning: bool = False) -> Any:
    """Return a copy of `value` with nulls dropped and defaults filled in, as it would be stored.

    With `is_pruning`, fields that the schema does not know are dropped too; otherwise they stay, to be reported.
    """
    if isinstance(value, dict):
        return _object_with_defaults(value, schema, is_pruning)
    if isinstance(value, list) and "items" in schema:
        return [with_defaults(item, schema["items"], is_pruning=is_pruning) for item in value]
    if isinstance(value, float) and value.is_integer() and schema.get("type") == "integer":
        return int(value)  # `replicas: 2.0` reaches an API server as 2
    return deepcopy(value)


def _object_with_defaults(value: dict[str, Any], schema: Schema, is_pruning: bool) -> dict[str, Any]:
    properties = schema.get("properties", {})
    keeps_unknown = not is_pruning or schema.get("x-kubernetes-preserve-unknown-fields", False)
    result = {}
    for key, field in value.items():
        of_field = properties.get(key, schema.get("additionalProperties"))
        if of_field is not None and field is not None:
            result[key] = with_defaults(field, of_field, is_pruning=is_pruning)
        elif of_field is None and keeps_unknown:
            result[key] = deepcopy(field)
    for key, of_field in properties.items():
        if key not in result and "default" in of_field:
            result[key] = with_defaults(of_field["default"], of_field)
    return result


def field_path(path: str, key: str, *, is_map_key: bool = False) -> str:
    """Return the path of a field of an object, as an API server writes it."""
    if is_map_key:
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def children(value: Any, schema: Schema, path: str) -> Iterator[tuple[Any, Schema, str]]:
    """Yield the known fields or items of a value, each with its schema and path."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        additional = schema.get("additionalProperties")
        for key, field in value.items():
            if key in properties:
                yield field, properties[key], field_path(path, key)
            elif additional is not None:
                yield field, additional, field_path(path, key, is_map_key=True)
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield item, schema["items"], f"{path}[{index}]"


def find_problems(value: Any, schema: Schema, path: str = "") -> Iterator[Problem]:
    """Yield what is wrong with a value that already has its defaults; rules (`x-kubernetes-validations`) aside."""
    problem = _find_type_problem(value, schema, path)
    if problem is not None:
        yield problem
        return
    if "enum" in schema and value not in schema["enum"]:
        yield Problem(path, f"must be {_one_of(schema['enum'])}, not {value!r}")
    if isinstance(value, str):
        yield from _find_string_problems(value, schema, path)
    elif isinstance(value, bool):
        return
    elif isinstance(value, int | float):
        yield from _find_number_problems(value, schema, path)
    elif isinstance(value, dict):
        yield from _find_object_problems(value, schema, path)
    elif isinstance(value, list):
        yield from _find_list_problems(value, schema, path)
    for child, child_schema, child_path in children(value, schema, path):
        yield from find_problems(child, child_schema, child_path)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "object": (lambda value: isinstance(value, dict), "a mapping"),
    "array": (lambda value: isinstance(value, list), "a list"),
    "string": (lambda value: isinstance(value, str), "a string"),
    "boolean": (lambda value: isinstance(value, bool), "true or false"),
    "integer": (_is_integer, "an integer"),
    "number": (lambda value: _is_integer(value) or isinstance(value, float), "a number"),
}


def _find_type_problem(value: Any, schema: Schema, path: str) -> Problem | None:
    if schema.get("x-kubernetes-int-or-string"):
        is_right, wanted = _is_integer(value) or isinstance(value, str), "an integer or a string"
    else:
        check, wanted = _TYPES[schema["type"]]
        is_right = check(value)
    if is_right:
        return None
    if isinstance(value, bool) and wanted == "a string":
        hint = "; write it in quotes, because YAML reads a bare on, off, yes, no, true or false as a boolean"
    elif isinstance(value, int | float) and not isinstance(value, bool) and wanted.endswith("a string"):
        hint = f'; write it in quotes: "{value}"'
    else:
        hint = ""
    return Problem(path, f"must be {wanted}{hint}", is_blocking=True)


def _find_string_problems(value: str, schema: Schema, path: str) -> Iterator[Problem]:
    if len(value) > schema.get("maxLength", len(value)):
        yield Problem(path, f"must be at most {schema['maxLength']} characters long", is_blocking=True)
    if len(value) < schema.get("minLength", 0):
        least = schema["minLength"]
        yield Problem(path, "must not be empty" if least == 1 else f"must be at least {least} characters long")
    if "pattern" in schema and re.search(schema["pattern"], value) is None:
        yield Problem(path, f"must match {schema['pattern']}")
    if schema.get("format") == "date-time" and not _is_date_time(value):
        yield Problem(path, "must be a time such as 2026-01-31T12:00:00Z")


def _is_date_time(value: str) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None and "T" in value.upper()
    except ValueError:
        return False


def _find_number_problems(value: float, schema: Schema, path: str) -> Iterator[Problem]:
    if value < schema.get("minimum", value):
        yield Problem(path, f"must be at least {schema['minimum']}")
    if value > schema.get("maximum", value):
        yield Problem(path, f"must be at most {schema['maximum']}")


def _find_object_problems(value: dict[str, Any], schema: Schema, path: str) -> Iterator[Problem]:
    for key in schema.get("required", ()):
        if key not in value:
            yield Problem(field_path(path, key), "is required", is_blocking=True)
    if len(value) > schema.get("maxProperties", len(value)):
        yield Problem(path, f"must have at most {schema['maxProperties']} entries", is_blocking=True)
    if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        known = schema.get("properties")
        if known is not None:
            yield from _find_unknown_fields(value, known, path)


def _find_unknown_fields(value: dict[str, Any], known: Mapping[str, Any], path: str) -> Iterator[Problem]:
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            yield Problem(field_path(path, str(key)), "unknown field" + (f"; is {close[0]} meant?" if close else ""))


def _find_list_problems(value: list[Any], schema: Schema, path: str) -> Iterator[Problem]:
    if len(value) > schema.get("maxItems", len(value)):
        yield Problem(path, f"must have at most {schema['maxItems']} items", is_blocking=True)
    if len(value) < schema.get("minItems", 0):
        least = schema["minItems"]
        yield Problem(path, f"must have at least {least} item{'' if least == 1 else 's'}")
    kind = schema.get("x-kubernetes-list-type")
    if kind not in ("set", "map"):
        return
    seen: list[Any] = []
    for index, item in enumerate(value):
        identity = item
        if kind == "map" and isinstance(item, dict):
            identity = [item.get(key) for key in schema["x-kubernetes-list-map-keys"]]
        if identity in seen:
            shown = ", ".join(map(str, identity)) if isinstance(identity, list) else identity
            yield Problem(f"{path}[{index}]", f"must not repeat {shown!r}")
        seen.append(identity)


def _one_of(values: list[Any]) -> str:
    return f"one of {', '.join(map(str, values))}"
