"""Drift on the golden documents, as an API server stores them and as somebody may have edited them."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quire_contract import names
from quire_kube.objects import Manifest
from quire_operator.plan.drift import describe_drift, is_applied
from quire_operator.spec.kinds import OPTIONAL_KINDS

GOLDEN = Path(__file__).parents[1] / "golden"
DOCUMENTS: list[Manifest] = [
    document for file in sorted(GOLDEN.glob("*.yaml")) for document in yaml.safe_load_all(file.read_text())
]
CUSTOM_KINDS = {kind.kind for kind in OPTIONAL_KINDS}
EXACT_MAPS = {"matchLabels", "selector", "nodeSelector", "podSelector", "namespaceSelector", "labelSelector"}
SHARED_LISTS = {"containers", "initContainers", "env", "volumes", "volumeMounts", "imagePullSecrets"}
QUANTITY_FORMS = {"2500m": "2.5", "16Gi": "17179869184", "1": "1000m", "2Gi": "2048Mi", "1Gi": "1024Mi"}
DEFAULTS = {"terminationMessagePath": "/dev/termination-log", "dnsPolicy": "ClusterFirst", "uid": "3f1c"}

Path_ = tuple[str | int, ...]


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Paths of all scalars, and of empty mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    is_leaf = True
    for key, child in items:
        is_leaf = False
        yield from leaves(child, (*path, key))
    if is_leaf:
        yield path


def at(document: Any, path: Path_) -> Any:
    for key in path:
        document = document[key]
    return document


@st.composite
def stored(draw: st.DrawFn, document: Any, field: str = "", *, is_custom: bool = False) -> Any:
    """What an API server may return for what was sent: defaults, others' additions, other forms of one value."""
    if isinstance(document, dict):
        copied = {key: draw(stored(value, key, is_custom=is_custom)) for key, value in document.items()}
        if not is_custom:
            if copied.get("egress") == [] and draw(st.booleans()):
                del copied["egress"]
            if copied.get("limits"):
                copied["limits"] = {key: QUANTITY_FORMS.get(text, text) for key, text in copied["limits"].items()}
        if field not in EXACT_MAPS:
            copied |= {key: value for key, value in DEFAULTS.items() if key not in document and draw(st.booleans())}
        order = draw(st.permutations(list(copied)))
        return {key: copied[key] for key in order}
    if isinstance(document, list):
        items = [draw(stored(item, is_custom=is_custom)) for item in document]
        if field in SHARED_LISTS and draw(st.booleans()):
            items.append({"name": "somebody-elses", "mountPath": "/elsewhere"})
            items = draw(st.permutations(items))
        return items
    return document


@given(st.data())
def test_a_document_as_the_api_server_stores_it_is_applied(data: st.DataObject) -> None:
    document = data.draw(st.sampled_from(DOCUMENTS))
    live = data.draw(stored(document, is_custom=document["kind"] in CUSTOM_KINDS))
    assert describe_drift(document, live) == ""
    assert is_applied(document, live)


@given(st.data())
def test_any_field_of_ours_that_was_changed_or_removed_is_found(data: st.DataObject) -> None:
    document = data.draw(st.sampled_from(DOCUMENTS))
    path = data.draw(st.sampled_from(list(leaves(document))))
    live = copy.deepcopy(document)
    holder, key, value = at(live, path[:-1]), path[-1], at(document, path)
    is_kept_when_empty = bool(value) or value is False or value == 0 or document["kind"] in CUSTOM_KINDS
    if data.draw(st.booleans()) and isinstance(key, str) and (is_kept_when_empty or isinstance(value, dict)):
        del holder[key]
    else:
        holder[key] = changed(value)
    assert describe_drift(document, live)
    assert not is_applied(document, live)


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("7" if value[-1:] != "7" else "8")
    return ["somebody's"] if isinstance(value, list) else "somebody's"


def find(kind: str, name: str | None = None) -> Manifest:
    found = (d for d in DOCUMENTS if d["kind"] == kind and name in (None, d["metadata"]["name"]))
    return copy.deepcopy(next(found))


def test_the_path_of_an_edited_field_is_told() -> None:
    desired, live = find("Deployment"), find("Deployment")
    live["spec"]["template"]["spec"]["containers"][0]["image"] = "evil"
    assert describe_drift(desired, live) == "spec.template.spec.containers[server].image"
    live = find("Deployment")
    live["spec"]["replicas"] += 1
    assert describe_drift(desired, live) == "spec.replicas"
    del live["spec"]["template"]["spec"]["volumes"][0]
    live["spec"]["replicas"] -= 1
    assert describe_drift(desired, live) == "spec.template.spec.volumes[model]"


def test_another_digest_alone_is_a_reason_to_send() -> None:
    desired, live = find("Deployment"), find("Deployment")
    live["metadata"]["annotations"][names.ANNOTATION_APPLIED_HASH] = "0"
    assert not is_applied(desired, live)
    del live["metadata"]["annotations"]
    assert not is_applied(desired, live)


def test_a_port_added_to_a_policy_or_a_label_to_a_selector_is_drift() -> None:
    desired, live = find("NetworkPolicy"), find("NetworkPolicy")
    live["spec"]["ingress"][0]["ports"].append({"port": 22, "protocol": "TCP"})
    assert describe_drift(desired, live) == "spec.ingress[0].ports"
    desired, live = find("NetworkPolicy"), find("NetworkPolicy")
    live["spec"]["egress"] = [{}]
    assert describe_drift(desired, live) == "spec.egress"
    desired, live = find("Service"), find("Service")
    live["spec"]["selector"]["version"] = "2"
    assert describe_drift(desired, live) == "spec.selector"


def test_a_port_added_to_a_service_is_somebody_elses() -> None:
    desired, live = find("Service"), find("Service")
    live["spec"]["ports"].insert(0, {"name": "https", "port": 443, "protocol": "TCP", "targetPort": 8443})
    live["spec"]["clusterIP"] = "10.0.0.7"
    assert describe_drift(desired, live) == ""
    live["spec"]["ports"][1]["targetPort"] = 22
    assert describe_drift(desired, live) == "spec.ports[80].targetPort"


@pytest.mark.parametrize(
    ("desired", "live"),
    [
        ({"hostNetwork": False, "priority": 0, "nodeSelector": {}, "args": [], "subdomain": ""}, {}),
        ({"env": [{"name": "EMPTY", "value": ""}]}, {"env": [{"name": "EMPTY"}]}),
        ({"resources": {"requests": {"cpu": "0.5"}}}, {"resources": {"requests": {"cpu": "500m"}}}),
        ({"resources": {"requests": {"cpu": 2}}}, {"resources": {"requests": {"cpu": "2"}}}),
        ({"ports": [{"containerPort": 1}]}, {"ports": [{"containerPort": 1, "protocol": "TCP"}]}),
        ({"runtimeClassName": None}, {}),
        ({"livenessProbe": {"timeoutSeconds": 0}}, {"livenessProbe": {"timeoutSeconds": 1}}),
    ],
)
def test_what_the_api_server_rewrites_without_changing_its_meaning_is_no_drift(desired: Any, live: Any) -> None:
    head = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    assert describe_drift({**head, "spec": desired}, {**head, "spec": live}) == ""


@pytest.mark.parametrize(
    ("desired", "live"),
    [
        ({"automountServiceAccountToken": False}, {}),
        ({"enableServiceLinks": False}, {"enableServiceLinks": True}),
        ({"replicas": 0}, {}),
        ({"replicas": 1}, {"replicas": True}),
        ({"env": [{"name": "CPU", "value": "1"}]}, {"env": [{"name": "CPU", "value": "1000m"}]}),
        ({"volumes": [{"name": "tmp", "emptyDir": {}}]}, {"volumes": [{"name": "tmp", "hostPath": {"path": "/"}}]}),
        ({"tolerations": [{"key": "a"}]}, {"tolerations": [{"key": "a"}, {"key": "b"}]}),
        ({"args": ["serve", "x"]}, {"args": ["x", "serve"]}),
        ({"resources": {"limits": {"cpu": "1"}}}, {"resources": {"limits": {"cpu": "many"}}}),
    ],
)
def test_what_means_something_else_is_drift(desired: Any, live: Any) -> None:
    head = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    assert describe_drift({**head, "spec": desired}, {**head, "spec": live})


def test_a_custom_resource_keeps_its_zeros() -> None:
    desired, live = find("ScaledObject", "elastic"), find("ScaledObject", "elastic")
    assert desired["spec"]["minReplicaCount"] == 0
    del live["spec"]["minReplicaCount"]
    assert describe_drift(desired, live) == "spec.minReplicaCount"
