"""The CustomResourceDefinition: one file, complete, and in step with the names that processes use."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quire_contract import names
from quire_contract.crd import load_crd, load_schema

ROOT = Path(__file__).resolve().parents[2]
VERSION = load_crd()["spec"]["versions"][0]


def _fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, child in schema.get("properties", {}).items():
        yield f"{path}.{name}", child
        yield from _fields(child, f"{path}.{name}")
    for key, suffix in (("items", "[]"), ("additionalProperties", "{}")):
        if key in schema:
            yield f"{path}{suffix}", schema[key]
            yield from _fields(schema[key], f"{path}{suffix}")


FIELDS = dict(_fields(load_schema()))
SPEC_FIELDS = {path: schema for path, schema in FIELDS.items() if path.startswith(".spec.")}


def test_the_package_holds_the_file_of_the_repository() -> None:
    link = ROOT / "contract" / "quire_contract" / "llmdeployment.crd.yaml"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "crds" / "llmdeployment.yaml"


def test_names_are_those_that_processes_use() -> None:
    spec = load_crd()["spec"]
    assert load_crd()["metadata"]["name"] == names.CRD_NAME
    assert (spec["group"], VERSION["name"]) == (names.API_GROUP, names.API_VERSION)
    assert spec["names"]["kind"] == names.KIND
    assert spec["names"]["listKind"] == f"{names.KIND}List"
    assert spec["names"]["plural"] == names.PLURAL
    assert spec["names"]["singular"] == names.SINGULAR
    assert spec["names"]["shortNames"] == [names.SHORT_NAME]
    assert f"<= {names.MAX_NAME_LENGTH}" in load_schema()["x-kubernetes-validations"][0]["rule"]


def test_one_number_of_replicas_behind_scale() -> None:
    assert VERSION["subresources"] == {
        "status": {},
        "scale": {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    }
    assert "default" not in FIELDS[".spec.replicas"]


def test_kubectl_get_shows_the_columns_of_the_design() -> None:
    listed = VERSION["additionalPrinterColumns"]
    columns = [column["name"].upper() for column in listed if not column.get("priority")]
    assert columns == ["MODEL", "PHASE", "READY", "REPLICAS", "REASON", "AGE"]


def test_every_field_says_what_it_is() -> None:
    undescribed = [path for path, schema in FIELDS.items() if not schema.get("description")]
    assert undescribed == [".metadata"]  # an API server refuses one there


def test_every_field_has_one_kind() -> None:
    for path, schema in FIELDS.items():
        assert ("type" in schema) != bool(schema.get("x-kubernetes-int-or-string")), path
        free = [key for key in schema if key == "x-kubernetes-preserve-unknown-fields"]
        assert bool(free) == (path == ".spec.podTemplate"), path
        if schema.get("type") == "object" and not free and path != ".metadata":
            assert "properties" in schema or "additionalProperties" in schema, path


def test_what_people_write_is_bounded() -> None:
    """Unbounded texts and lists cost an API server too much to check rules on."""
    for path, schema in SPEC_FIELDS.items():
        if schema.get("type") == "string":
            assert "maxLength" in schema or "enum" in schema, path
        if schema.get("type") == "array":
            assert "maxItems" in schema, path
        if "additionalProperties" in schema:
            assert "maxProperties" in schema, path


def test_every_rule_says_what_to_do_and_where() -> None:
    for path, schema in {"": load_schema(), **FIELDS}.items():
        for rule in schema.get("x-kubernetes-validations", ()):
            assert rule["message"].split()[0] in ("must", "exactly"), (path, rule["message"])
            assert "\n" not in rule["message"], path
            if "fieldPath" in rule and path != "":
                assert path + rule["fieldPath"] in FIELDS, (path, rule["fieldPath"])


def test_the_contract_loads_yaml_only_when_asked() -> None:
    """A server must not load it to learn a port."""
    for module in (ROOT / "contract" / "quire_contract").glob("*.py"):
        imports = [node for node in ast.parse(module.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("yaml" in ast.unparse(node) for node in imports), module
