"""Is a manifest an LLMDeployment that an API server would take? Asked by `quire up` before anything starts.

The verdict comes from the CRD alone: its schema (`schema.py`) and its CEL rules (`rules.py`). Nothing is written twice,
so a laptop and a cluster refuse the same manifests, at the same field, with the same words. Unknown fields are refused,
as `kubectl apply` refuses them.
"""

from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any

from quire_contract.crd import load_schema
from quire_contract.names import GROUP_VERSION, KIND
from quire_contract.nesting import NestingError, bounded_nesting, check_depth
from quire_operator.spec.rules import find_rule_problems
from quire_operator.spec.schema import Problem, find_problems, with_defaults

__all__ = ["DocumentError", "Problem", "load_documents", "validate_manifest", "validate_status"]


class DocumentError(ValueError):
    """A file is not YAML, or holds something else than mappings. The message starts with `file:line`."""


_METADATA_FIELDS: dict[str, dict[str, Any]] = {
    "name": {"type": "string", "minLength": 1},
    "generateName": {"type": "string"},
    "namespace": {"type": "string", "minLength": 1, "maxLength": 63},
    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    "finalizers": {"type": "array", "items": {"type": "string"}},
    "ownerReferences": {
        "type": "array",
        "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    },
    "managedFields": {
        "type": "array",
        "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    },
    "uid": {"type": "string"},
    "resourceVersion": {"type": "string"},
    "generation": {"type": "integer"},
    "creationTimestamp": {"type": "string"},
    "deletionTimestamp": {"type": "string"},
    "deletionGracePeriodSeconds": {"type": "integer"},
    "selfLink": {"type": "string"},
}
"""ObjectMeta, which no CRD describes."""


def validate_manifest(document: dict[str, Any]) -> tuple[Problem, ...]:
    """Return everything that is wrong with a manifest; empty where it can be applied. A status is not looked at."""
    for field, wanted in (("apiVersion", GROUP_VERSION), ("kind", KIND)):
        given = document.get(field)
        if given != wanted:
            return (Problem(field, f"must be {wanted}" + ("" if given is None else f", not {given}")),)
    manifest = {key: value for key, value in document.items() if key != "status"}
    schema = _manifest_schema()
    stored = with_defaults(manifest, schema)
    problems = tuple(find_problems(stored, schema))
    if any(problem.is_blocking for problem in problems):
        return problems
    return problems + tuple(find_rule_problems(stored, schema))


def validate_status(status: dict[str, Any]) -> tuple[Problem, ...]:
    """Return everything that is wrong with a status, with paths from `status` on."""
    return tuple(find_problems(status, load_schema()["properties"]["status"], "status"))


@cache
def _manifest_schema() -> dict[str, Any]:
    schema = load_schema()
    name = {**schema["properties"]["metadata"]["properties"]["name"], **_METADATA_FIELDS["name"]}
    metadata = {"type": "object", "required": ["name"], "properties": {**_METADATA_FIELDS, "name": name}}
    properties = {**schema["properties"], "metadata": metadata}
    return {**schema, "properties": properties, "required": ["metadata", *schema["required"]]}


def load_documents(path: Path) -> list[dict[str, Any]]:
    """Read every YAML document of a file, in order; empty ones are passed over.

    Raises:
        DocumentError: not YAML, a key twice in one mapping, or a document that is no mapping; with file and line.
        OSError: the file cannot be read.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        loader = _make_loader_class()(text)
        documents = []
        while loader.check_node():
            node = loader.get_node()
            with bounded_nesting():
                document = loader.construct_document(node)
            if document is None:
                continue
            if not isinstance(document, dict):
                raise DocumentError(f"{path}:{node.start_mark.line + 1}: a manifest is a mapping (apiVersion: …)")
            check_depth(document)
            documents.append(document)
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}:1: not UTF-8: {error.reason}") from None
    except NestingError as error:
        raise DocumentError(f"{path}:{node.start_mark.line + 1}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise DocumentError(f"{path}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise DocumentError(f"{path}: {error}") from None
    return documents


@cache
def _make_loader_class() -> Any:
    """Make a YAML loader that agrees with kubectl: times stay strings, and a key given twice is an error."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class ManifestLoader(base):  # type: ignore[misc]
        yaml_implicit_resolvers = {  # noqa: RUF012
            letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
            for letter, resolvers in base.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                    continue
                key = key_node.value
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
                seen.add(key)
            mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
            return mapping

    return ManifestLoader
