"""Strategic merge: what `kubectl patch --type=strategic` does, and the three things in which ours is kinder."""

import copy
from typing import Any

import pytest

from quire_operator.plan.resources.workload.merge import merge_strategically
from quire_operator.spec.llm_deployment import SpecError

SERVER = {
    "name": "server",
    "args": ["serve", "/models"],
    "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
    "ports": [{"name": "http", "containerPort": 8000, "protocol": "TCP"}],
    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    "readinessProbe": {"httpGet": {"path": "/readyz", "port": "http"}, "periodSeconds": 2},
    "resources": {"limits": {"cpu": "2", "memory": "2Gi"}},
}
BASE: dict[str, Any] = {
    "metadata": {"labels": {"app": "quire"}},
    "spec": {
        "containers": [SERVER],
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "model", "persistentVolumeClaim": {"claimName": "m"}}],
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "securityContext": {"runAsUser": 65532, "runAsNonRoot": True},
        "terminationGracePeriodSeconds": 145,
    },
}


def merge_spec(patch: dict[str, Any]) -> dict[str, Any]:
    base = copy.deepcopy(BASE)
    merged = merge_strategically(base, {"spec": patch}, "spec.podTemplate")
    assert base == BASE
    spec: dict[str, Any] = merged["spec"]
    return spec


def merge_server(patch: dict[str, Any]) -> dict[str, Any]:
    containers = merge_spec({"containers": [{"name": "server", **patch}]})["containers"]
    assert len(containers) == 1
    server: dict[str, Any] = containers[0]
    return server


def test_nothing_changes_nothing() -> None:
    assert merge_strategically(BASE, {}, "p") == BASE
    assert merge_server({}) == SERVER


def test_mappings_merge_and_null_removes() -> None:
    spec = merge_spec({"securityContext": {"runAsUser": None, "supplementalGroups": [1]}, "hostNetwork": True})
    assert spec["securityContext"] == {"runAsNonRoot": True, "supplementalGroups": [1]}
    assert spec["hostNetwork"] is True
    assert merge_server({"resources": {"limits": {"cpu": None}}})["resources"] == {"limits": {"memory": "2Gi"}}
    assert "nodeSelector" not in merge_spec({"nodeSelector": None})


def test_a_container_is_changed_in_place_and_a_new_one_comes_after() -> None:
    containers = merge_spec({"containers": [{"name": "sidecar", "image": "x"}, {"name": "server", "image": "y"}]})
    assert [container["name"] for container in containers["containers"]] == ["server", "sidecar"]
    assert containers["containers"][0] == {**SERVER, "image": "y"}


@pytest.mark.parametrize(
    ("field", "patch", "merged"),
    [
        ("env", [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}], [("A", "1"), ("B", "3"), ("C", "4")]),
        ("env", [{"name": "A", "$patch": "delete"}], [("B", "2")]),
        ("env", [{"$patch": "replace"}, {"name": "C", "value": "4"}], [("C", "4")]),
        ("env", [{"name": "Z", "$patch": "delete"}], [("A", "1"), ("B", "2")]),
    ],
)
def test_variables_merge_by_name(field: str, patch: list[Any], merged: list[tuple[str, str]]) -> None:
    assert [(item["name"], item["value"]) for item in merge_server({field: patch})[field]] == merged


def test_other_lists_are_replaced() -> None:
    assert merge_server({"args": ["serve", "elsewhere"]})["args"] == ["serve", "elsewhere"]
    assert merge_server({"envFrom": [{"$patch": "replace"}, {"secretRef": {"name": "s"}}]})["envFrom"] == [
        {"secretRef": {"name": "s"}}
    ]


def test_ports_merge_by_number_and_protocol_and_mounts_by_path() -> None:
    server = merge_server(
        {
            "ports": [{"containerPort": 8000, "hostPort": 80}, {"containerPort": 8000, "protocol": "UDP"}],
            "volumeMounts": [{"mountPath": "/tmp", "name": "other"}, {"mountPath": "/data", "name": "data"}],
        }
    )
    assert server["ports"] == [
        {"name": "http", "containerPort": 8000, "protocol": "TCP", "hostPort": 80},
        {"containerPort": 8000, "protocol": "UDP"},
    ]
    assert [(m["mountPath"], m["name"]) for m in server["volumeMounts"]] == [("/tmp", "other"), ("/data", "data")]


def test_directives_for_whole_mappings_and_lists_of_texts() -> None:
    spec = merge_spec({"securityContext": {"$patch": "replace", "fsGroup": 1}})
    assert spec["securityContext"] == {"fsGroup": 1}
    assert "securityContext" not in merge_spec({"securityContext": {"$patch": "delete"}})
    server = merge_server({"$deleteFromPrimitiveList/args": ["serve"], "$setElementOrder/env": [{"name": "A"}]})
    assert server["args"] == ["/models"]
    assert server["env"] == SERVER["env"]
    assert merge_spec({"containers": [{"$patch": "replace"}, {"name": "only"}]})["containers"] == [{"name": "only"}]
    assert merge_server({"$patch": "replace", "image": "x"}) == {"name": "server", "image": "x"}


def test_tolerations_are_added_to_those_of_the_profile() -> None:
    mine = {"key": "dedicated", "operator": "Equal", "value": "a", "effect": "NoSchedule"}
    other = {**mine, "value": "b"}
    ours = BASE["spec"]["tolerations"][0]
    assert merge_spec({"tolerations": [mine, other, dict(ours)]})["tolerations"] == [ours, mine, other]
    assert merge_spec({"tolerations": [{"operator": "Exists"}]})["tolerations"] == [ours, {"operator": "Exists"}]
    assert merge_spec({"tolerations": [{"$patch": "replace"}, mine]})["tolerations"] == [mine]


def test_required_terms_of_affinity_are_added_to_those_that_pods_need() -> None:
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    ours = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"quire.dev/claim": "1"}}}
    mine = {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "mine"}}}
    base = {"spec": {"affinity": {"podAffinity": {required: [ours]}}}}

    def merged(*terms: Any) -> Any:
        patch = {"spec": {"affinity": {"podAffinity": {required: list(terms)}, "podAntiAffinity": {required: [mine]}}}}
        affinity = merge_strategically(base, patch, "p")["spec"]["affinity"]
        assert affinity["podAntiAffinity"] == {required: [mine]}
        return affinity["podAffinity"][required]

    assert merged(mine) == [ours, mine]
    assert merged(mine, ours) == [ours, mine]
    assert merged({"$patch": "replace"}, mine) == [mine]


def test_of_fields_that_exclude_one_another_the_users_replaces_ours() -> None:
    volumes = merge_spec({"volumes": [{"name": "tmp", "hostPath": {"path": "/scratch"}}]})["volumes"]
    assert volumes[0] == {"name": "tmp", "hostPath": {"path": "/scratch"}}
    sized = merge_spec({"volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}]})["volumes"]
    assert sized[0] == {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}
    probe = merge_server({"readinessProbe": {"exec": {"command": ["true"]}}})["readinessProbe"]
    assert probe == {"exec": {"command": ["true"]}, "periodSeconds": 2}
    source = {"secretKeyRef": {"name": "s", "key": "k"}}
    assert merge_server({"env": [{"name": "A", "valueFrom": source}]})["env"][0] == {"name": "A", "valueFrom": source}


@pytest.mark.parametrize(
    ("patch", "path"),
    [
        ({"containers": {"name": "server"}}, "p.spec.containers"),
        ({"containers": ["server"]}, "p.spec.containers"),
        ({"containers": [{"image": "x"}]}, "p.spec.containers[0].name"),
        ({"containers": [{"name": "server", "ports": [{"name": "x"}]}]}, "p.spec.containers[0].ports[0].containerPort"),
        ({"containers": [{"name": "server"}, "x"]}, "p.spec.containers[1]"),
        ({"securityContext": []}, "p.spec.securityContext"),
        ({"terminationGracePeriodSeconds": {"seconds": 1}}, "p.spec.terminationGracePeriodSeconds"),
        ({"securityContext": {"$patch": "remove"}}, "p.spec.securityContext.$patch"),
        ({"containers": [{"name": "server", "$deleteFromPrimitiveList/args": "serve"}]}, "p.spec.containers[0]."),
        ("text", "p.spec"),
    ],
)
def test_what_cannot_be_merged_names_its_field(patch: Any, path: str) -> None:
    with pytest.raises(SpecError) as caught:
        merge_strategically(BASE, {"spec": patch}, "p")
    assert caught.value.path.startswith(path)
