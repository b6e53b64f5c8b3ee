"""With the operator killed and the API server restarted, requests are answered; afterwards status is true."""

import pytest
from support.chart import Chart
from support.kubectl import Kubectl, is_true, wait_for
from support.manifests import llm
from support.node import ApiServer, background_load, stop_background_load
from support.traffic import load, start_client, wait_ready


def test_no_request_fails_without_an_operator(kubectl: Kubectl, chart: Chart, server_image: str) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("steady"))
    wait_ready(kubectl, "steady")
    with load(kubectl, "steady") as result:
        chart.kill_operators()
        kubectl("delete", "service", "steady-pods")
        chart.wait_ready()
        wait_for(
            "the deleted Service is back",
            lambda: kubectl.get("service", "steady-pods"),
            timeout_s=60,
            describe=kubectl.describe_all,
        )
    assert result.answered > 20
    assert result.num_failed == 0, result.failures
    assert is_true(kubectl.llm("steady"), "Ready")


@pytest.mark.own_cluster
def test_no_request_fails_without_an_api_server(
    kubectl: Kubectl, chart: Chart, api_server: ApiServer, server_image: str
) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("steady"))
    wait_ready(kubectl, "steady")
    before = kubectl.llm("steady")["status"]
    kubectl.apply(background_load(kubectl.namespace, "steady", server_image))
    wait_for("load", lambda: "asking" in kubectl("logs", "background", check=False), timeout_s=60)
    api_server.restart()
    wait_for("the API server answers", lambda: kubectl("get", "llm", check=False), timeout_s=60)
    kubectl("scale", "llm/steady", "--replicas=2")
    wait_for(
        "the operator works again",
        lambda: kubectl.llm("steady")["status"]["readyReplicas"] == 2,
        timeout_s=120,
        describe=kubectl.describe_all,
    )
    answered, failed = stop_background_load(kubectl)
    api_server.wait_followed(kubectl)
    assert answered > 20
    assert failed == []
    after = kubectl.llm("steady")["status"]
    assert is_true(kubectl.llm("steady"), "Ready")
    assert after["endpoint"] == before["endpoint"]
