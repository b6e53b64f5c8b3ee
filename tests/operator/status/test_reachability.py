"""Ready says what a client meets: judged by what Kubernetes documents of Services, selectors and ports."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from status_objects import (
    NAME,
    NAMESPACE,
    build_manifest,
    build_observed,
    build_plan,
    build_pod,
    build_service,
    check,
    derive,
    ending,
    look,
    rolled_out,
    shown_condition,
)

from quire_kube.objects import Manifest, Ref
from quire_operator.plan.actions import Apply
from quire_operator.plan.rollout import live_workload
from quire_operator.spec.kinds import DEPLOYMENT, SERVICE
from quire_operator.watch.observed import Observed

HTTP = {"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}


def _observed(*pods: Manifest, **services: Manifest) -> Observed:
    """A workload that is rolled out, and exactly these Services, by name."""
    children = {Ref(kind=DEPLOYMENT, namespace=NAMESPACE, name=NAME): rolled_out()}
    for service in services.values():
        children[Ref(kind=SERVICE, namespace=NAMESPACE, name=service["metadata"]["name"])] = service
    return Observed(manifest=build_manifest(), children=children, pods=pods)


def test_another_service_of_ours_is_not_the_one_that_clients_call() -> None:
    observed = _observed(build_pod(ready=True), pods=build_service(f"{NAME}-pods"))
    assert look(observed)[2] == ("False", "ServiceMissing")
    assert shown_condition(derive(observed), "ServiceReady") == ("False", "ServiceMissing")


def test_a_service_that_is_only_planned_is_not_there() -> None:
    plan = build_plan(actions=(Apply(manifest=build_service(), reason="Created"),))
    assert look(_observed(build_pod(ready=True)), plan)[2] == ("False", "ServiceMissing")


def test_a_service_on_its_way_out_answers_nobody() -> None:
    observed = _observed(build_pod(ready=True), main=ending(build_service()))
    assert look(observed)[2][0] == "False"


@pytest.mark.parametrize(
    "spec",
    [
        {"selector": {"quire.dev/deployment": "another"}},
        {"selector": {"quire.dev/deployment": NAME, "track": "stable"}},
        {"selector": {}},
        {"selector": None},
        {"type": "ExternalName", "externalName": "example.com"},
        {"clusterIP": "None"},
        {"ports": []},
        {"ports": [HTTP | {"port": 8080}]},
        {"ports": [HTTP | {"targetPort": "web"}]},
        {"ports": [HTTP | {"targetPort": 9000}]},
        {"ports": [{"port": 80}]},
        {"ports": [HTTP | {"protocol": "UDP"}]},
    ],
    ids=str,
)
def test_a_service_that_leads_elsewhere_serves_nobody(spec: dict[str, Any]) -> None:
    observed = _observed(build_pod(ready=True), main=build_service(**spec))
    phase, reason, ready = look(observed)
    assert ready == ("False", "ServiceMisled")
    assert phase == "Loading"
    assert reason.startswith("ServiceMisled: ")
    assert shown_condition(derive(observed), "ServiceReady") == ("False", "ServiceMisled")


@pytest.mark.parametrize("target", ["http", 8000])
def test_a_service_that_leads_to_the_server_is_ready(target: object) -> None:
    other = {"name": "metrics", "port": 81, "targetPort": "nowhere"}
    service = build_service(ports=[other, HTTP | {"targetPort": target}])
    assert look(_observed(build_pod(ready=True), main=service))[2] == ("True", "Serving")


def test_a_renamed_container_port_is_not_found_by_its_old_name() -> None:
    pod = build_pod(ready=True)
    pod["spec"]["containers"][0]["ports"][0]["name"] = "web"
    assert look(_observed(pod, main=build_service()))[2] == ("False", "ServiceMisled")


def test_a_gateway_without_its_service_wakes_nobody() -> None:
    plan = build_plan(replicas=0)
    assert look(_observed(), plan, gateway=True)[2][0] == "False"
    assert look(_observed(main=build_service()), plan, gateway=True)[2] == ("True", "ScaledToZero")


def test_a_copy_of_the_workload_is_not_the_workload() -> None:
    copied = rolled_out()
    copied["metadata"] |= {"name": "mine", "creationTimestamp": "2025-11-21T12:00:00Z"}
    observed = build_observed(build_pod(ready=True), workload=rolled_out())
    children = {**observed.children, Ref(kind=DEPLOYMENT, namespace=NAMESPACE, name="mine"): copied}
    found = live_workload(Observed(manifest=build_manifest(), children=children))
    assert found is not None
    assert found[0].name == NAME


_labels = st.dictionaries(st.sampled_from(["quire.dev/deployment", "app"]), st.sampled_from([NAME, "b"]), max_size=2)
_service_ports = st.fixed_dictionaries(
    {"port": st.sampled_from([80, 8000])},
    optional={
        "targetPort": st.sampled_from(["http", "web", 80, 8000, 9000]),
        "protocol": st.sampled_from(["TCP", "UDP"]),
    },
)
_container_ports = st.fixed_dictionaries(
    {"name": st.sampled_from(["http", "web"]), "containerPort": st.sampled_from([8000, 9000])}
)


@st.composite
def _pods(draw: st.DrawFn) -> Manifest:
    pod = build_pod(draw(st.sampled_from("abc")), ready=draw(st.booleans()))
    pod["metadata"]["labels"] |= draw(_labels)
    pod["spec"]["containers"][0]["ports"] = draw(st.lists(_container_ports, max_size=2))
    pod["status"]["phase"] = draw(st.sampled_from(["Pending", "Running", "Failed", "Succeeded"]))
    return ending(pod) if draw(st.booleans()) else pod


def _is_answered(service: Manifest, pod: Manifest) -> bool:
    """Whether a connection to port 80 may end in the server of this pod, by the words of the Service documentation."""
    conditions = {one["type"]: one["status"] for one in pod["status"]["conditions"]}
    is_endpoint = conditions["Ready"] == "True" and pod["status"]["phase"] not in ("Failed", "Succeeded")
    selector, labels = service["spec"]["selector"], pod["metadata"]["labels"]
    is_selected = bool(selector) and all(labels.get(key) == value for key, value in selector.items())
    named = {(port["name"], port["containerPort"]) for port in pod["spec"]["containers"][0]["ports"]}
    leads = any(
        port["port"] == 80
        and port.get("protocol", "TCP") == "TCP"
        and (port.get("targetPort", 80) == 8000 or (port.get("targetPort"), 8000) in named)
        for port in service["spec"]["ports"]
    )
    return is_endpoint and is_selected and leads and "deletionTimestamp" not in pod["metadata"]


@given(
    pods=st.lists(_pods(), max_size=3),
    selector=_labels,
    ports=st.lists(_service_ports, max_size=2),
    is_ending=st.booleans(),
    replicas=st.integers(0, 2),
    gateway=st.booleans(),
)
def test_whenever_ready_says_true_a_request_succeeds(
    pods: list[Manifest], selector: dict[str, str], ports: list[Manifest], is_ending: bool, replicas: int, gateway: bool
) -> None:
    service = build_service(selector=selector, ports=ports)
    observed = _observed(*pods, main=ending(service) if is_ending else service)
    status = derive(observed, build_plan(replicas=replicas), gateway=gateway)
    check(status)
    is_answered = not is_ending and any(_is_answered(service, pod) for pod in pods)
    ready = shown_condition(status, "Ready")
    assert (ready == ("True", "Serving")) == is_answered
    if ready[0] == "True" and not is_answered:
        assert (ready[1], gateway, replicas) == ("ScaledToZero", True, 0), "the gateway holds the request"
