"""The chart as Helm renders it: golden files, what a user may not say, and that it agrees with the code it starts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

from quire_contract import metrics, names, ports
from quire_contract.crd import load_crd
from quire_operator.spec.kinds import OWNED_KINDS, SHARED_KINDS
from quire_operator.spec.settings import Settings, parse_settings
from quire_operator.watch.kopf_watch.handlers import WATCHED_KINDS

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "quire"
CASES = sorted((CHART / "ci").glob("*-values.yaml"))
Document = dict[str, Any]

pytestmark = pytest.mark.parametrize("values", CASES, ids=lambda values: values.stem.removesuffix("-values"))


@pytest.fixture
def documents(rendering: ModuleType, values: Path) -> list[Document]:
    return list(yaml.safe_load_all(rendering.render("--values", values)))


def find(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [one for one in documents if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def settings_of(documents: list[Document]) -> Settings:
    return parse_settings(yaml.safe_load(find(documents, "ConfigMap", "quire-operator")["data"]["operator.yaml"]))


def rules_of(documents: list[Document]) -> list[Document]:
    return [
        rule
        for document in documents
        if document["kind"] in ("Role", "ClusterRole") and document["metadata"]["name"].startswith("quire-operator")
        for rule in document["rules"]
    ]


def pod_specs(documents: list[Document]) -> Iterator[Document]:
    for document in documents:
        if document["kind"] == "Deployment":
            yield document["spec"]["template"]["spec"]


def test_it_renders_what_the_golden_file_says(rendering: ModuleType, values: Path) -> None:
    golden = ROOT / "e2e" / "chart" / "golden" / values.name.replace("-values", "")
    rendered = list(yaml.safe_load_all(rendering.build_golden(values)))
    assert rendered == list(yaml.safe_load_all(golden.read_text())), "read `make chart`'s difference, then commit it"


def test_helm_lint_finds_nothing(rendering: ModuleType, values: Path) -> None:
    said = rendering.helm("lint", "--strict", "--kube-version", rendering.KUBE_VERSION, "--values", values, CHART)
    assert "WARNING" not in said
    assert "0 chart(s) failed" in said


def test_the_operator_takes_its_settings(documents: list[Document], values: Path) -> None:
    settings = settings_of(documents)
    given = yaml.safe_load(values.read_text())
    assert set(settings.profiles) == set(given.get("profiles", {}))
    assert list(settings.namespaces) == given.get("namespaces", [])
    assert settings.image_volumes is given.get("models", {}).get("imageVolumes")
    assert settings.gpu_memory == given.get("models", {}).get("gpuMemory", "")
    assert settings.download.hub_endpoint == given.get("download", {}).get("hubEndpoint", "")


def test_every_setting_is_in_the_file(documents: list[Document]) -> None:
    written = yaml.safe_load(find(documents, "ConfigMap", "quire-operator")["data"]["operator.yaml"])
    assert set(written) == set(Settings.__struct_encode_fields__)
    assert set(written["images"]) == set(type(Settings().images).__struct_encode_fields__)
    assert set(written["download"]) == set(type(Settings().download).__struct_encode_fields__)


def test_the_definition_is_the_repositorys_and_stays(documents: list[Document], values: Path) -> None:
    found = [one for one in documents if one["kind"] == "CustomResourceDefinition"]
    if not (yaml.safe_load(values.read_text()).get("crds") or {"enabled": True})["enabled"]:
        assert not found
        return
    (definition,) = found
    assert definition["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert definition == load_crd()


def test_the_operator_may_do_what_its_code_does(documents: list[Document]) -> None:
    allowed = {
        (group, resource, verb)
        for rule in rules_of(documents)
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    watching = {(kind.group, kind.plural, verb) for kind in WATCHED_KINDS for verb in ("list", "watch")}
    writing = {
        (kind.group, kind.plural, verb)
        for kind in (*OWNED_KINDS, *SHARED_KINDS)
        for verb in ("get", "create", "update", "patch", "delete")
    }
    own = {(names.API_GROUP, names.PLURAL, "patch"), (names.API_GROUP, f"{names.PLURAL}/status", "patch")}
    lease = {("coordination.k8s.io", "leases", verb) for verb in ("create", "get", "update")}
    other = {("", "pods", "patch"), *(("", "events", verb) for verb in ("list", "create"))}
    is_whole_cluster = any(one["kind"] == "ClusterRoleBinding" for one in documents)
    other |= {("storage.k8s.io", "storageclasses", "list")} if is_whole_cluster else set()
    assert allowed == watching | writing | own | lease | other


def test_no_role_of_the_operator_has_a_wildcard_or_reaches_a_secret(documents: list[Document]) -> None:
    for rule in rules_of(documents):
        assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])
        assert not {"secrets", "configmaps", "nodes", "pods/exec", "roles"} & set(rule["resources"])


def test_namespace_scope_has_nothing_of_the_cluster(documents: list[Document], values: Path) -> None:
    if (yaml.safe_load(values.read_text()).get("rbac") or {}).get("scope") != "namespace":
        pytest.skip("cluster scope")
    assert all("namespace" in one["metadata"] for one in documents)
    roles = {one["metadata"]["namespace"] for one in documents if one["kind"] == "Role"}
    assert roles == {*settings_of(documents).namespaces, "quire-system"}


def test_names_that_the_code_relies_on(documents: list[Document]) -> None:
    lease = next(rule for rule in rules_of(documents) if "resourceNames" in rule)
    assert lease["resourceNames"] == [names.OPERATOR_LEASE]
    labels = find(documents, "Deployment", "quire-operator")["spec"]["template"]["metadata"]["labels"]
    assert labels[names.LABEL_COMPONENT] == names.COMPONENT_OPERATOR
    for document in documents:
        if document["kind"] == "Service":
            assert document["metadata"]["name"] == names.GATEWAY_SERVICE
        if document["kind"] == "Deployment":
            ports_of = {one["name"]: one["containerPort"] for one in containers(document)[0]["ports"]}
            assert ports_of in (
                {"health": ports.OPERATOR_HEALTH, "metrics": ports.OPERATOR_METRICS},
                {"http": ports.GATEWAY_HTTP},
            )


def containers(deployment: Document) -> list[Document]:
    found: list[Document] = deployment["spec"]["template"]["spec"]["containers"]
    return found


def test_selectors_select_the_pods(documents: list[Document]) -> None:
    pods = [one["spec"]["template"]["metadata"]["labels"] for one in documents if one["kind"] == "Deployment"]
    for document in documents:
        if document["kind"] in ("Deployment", "PodDisruptionBudget"):
            selector = document["spec"]["selector"]["matchLabels"]
        elif document["kind"] == "Service":
            selector = document["spec"]["selector"]
        else:
            continue
        assert sum(selector.items() <= labels.items() for labels in pods) == 1


def test_every_image_is_pinned(documents: list[Document]) -> None:
    settings = settings_of(documents)
    images = [one["image"] for spec in pod_specs(documents) for one in spec["containers"]]
    for image in (*images, settings.images.server_cpu, settings.images.server_cuda):
        assert re.search(r"(:[\w.-]+|@sha256:[0-9a-f]{64})$", image), image
        assert not image.endswith(":latest")


def fields(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [required], "additionalProperties": False, "properties": properties}


TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD_MONITOR = fields(
    "podMetricsEndpoints",
    selector={"type": "object"},
    podMetricsEndpoints={
        "type": "array",
        "items": fields(
            "port", port=TEXT, path=TEXT, interval={"pattern": "^[0-9]+s$"}, honorLabels={"type": "boolean"}
        ),
    },
)
RULE = fields("alert", alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS, **{"for": {"pattern": "^[0-9]+m$"}})
PROMETHEUS_RULE = fields(
    "groups", groups={"type": "array", "items": fields("rules", name=TEXT, rules={"type": "array", "items": RULE})}
)
"""What of monitoring.coreos.com/v1 is used, and nothing besides: a cluster need not have those kinds."""


def test_monitoring_objects_are_in_their_schemas(documents: list[Document]) -> None:
    for document in documents:
        schema = {"PodMonitor": POD_MONITOR, "PrometheusRule": PROMETHEUS_RULE}.get(document["kind"])
        if schema is not None:
            jsonschema.validate(document["spec"], schema)


def test_monitors_name_ports_that_pods_have(documents: list[Document]) -> None:
    known = {port["name"] for one in documents if one["kind"] == "Deployment" for port in containers(one)[0]["ports"]}
    for document in documents:
        if document["kind"] == "PodMonitor":
            assert {endpoint["port"] for endpoint in document["spec"]["podMetricsEndpoints"]} <= known


def exported_metrics() -> set[str]:
    """Every series name that a process exports, as it is written in a query."""
    from quire_operator.process.metrics import Metrics, Readings

    readings = Readings(watch_ages_s=(("pods", 1.0),), phases=("Ready",))
    operator = Metrics(lambda: readings)
    operator.count_reconcile("ok", 0.1)
    operator.count_api_call("get", "pods", 200)
    found = set(re.findall(r"^(quire_operator_\w+)", operator.render().decode(), re.MULTILINE))
    found |= {value for name, value in vars(metrics).items() if name.startswith("GATEWAY_")}
    for metric in metrics.SERVER_METRICS:
        found |= {metric.name, f"{metric.name}_bucket", f"{metric.name}_count", f"{metric.name}_sum"}
    return found


def test_queries_name_metrics_that_exist(documents: list[Document]) -> None:
    queries: list[str] = []
    for document in documents:
        if document["metadata"]["name"] == "quire-dashboard":
            panels = json.loads(document["data"]["quire.json"])["panels"]
            queries += [target["expr"] for panel in panels for target in panel.get("targets", ())]
            assert len(queries) > 20
        if document["kind"] == "PrometheusRule":
            queries += [rule["expr"] for group in document["spec"]["groups"] for rule in group["rules"]]
    named = {name for query in queries for name in re.findall(r"(?:vllm:|quire_)\w+", query)}
    assert named <= exported_metrics()
