"""Two operators and one leader: when it dies or hangs, the other takes over within the Lease's time."""

import re
import time

import pytest
from support.chart import Chart
from support.kubectl import Kubectl, wait_for
from support.manifests import llm
from support.node import hanging

LATE_S = 5.0
"""What the other may be late: it looks at the Lease every tenth of its time, and the machine is busy."""


def wait_taken_over(chart: Chart, leader: str, since: float, lease_s: float) -> str:
    """Wait until another leads, and say how long that took; return who."""
    wait_for("another leader", lambda: chart.leader() not in ("", leader), timeout_s=lease_s + 15, every_s=0.1)
    took_s = time.monotonic() - since
    print(f"\ntaken over after {took_s:.1f} s (Lease of {lease_s:.0f} s)")
    assert took_s <= lease_s + LATE_S
    successor = chart.leader()
    assert successor in {pod["metadata"]["name"] for pod in chart.operator_pods()}
    return successor


def wait_seen(kubectl: Kubectl, name: str) -> None:
    wait_for(
        "the new leader works",
        lambda: kubectl.llm(name).get("status", {}).get("conditions"),
        timeout_s=30,
        describe=kubectl.describe_all,
    )


def test_the_other_takes_over(kubectl: Kubectl, chart: Chart) -> None:
    pods = {pod["metadata"]["name"] for pod in chart.operator_pods()}
    assert len(pods) == 2
    leader = chart.leader()
    assert leader in pods
    lease_s = chart.lease_s()
    chart.kubectl("delete", "pod", leader, "--grace-period=0", "--force")
    killed = time.monotonic()
    kubectl.apply(llm("orphaned"))
    wait_taken_over(chart, leader, killed, lease_s)
    wait_seen(kubectl, "orphaned")
    chart.wait_ready()


def logs(chart: Chart, pod: str) -> str:
    """What a pod has said, before a restart too: one whose work does not stop at once ends instead."""
    return chart.kubectl("logs", pod, "--previous", check=False) + chart.kubectl("logs", pod, check=False)


@pytest.mark.own_cluster
def test_one_that_hangs_is_succeeded_and_stands_back(kubectl: Kubectl, chart: Chart) -> None:
    chart.wait_ready()
    leader, lease_s = chart.leader(), chart.lease_s()
    with hanging(leader):
        hung = time.monotonic()
        kubectl.apply(llm("orphaned"))
        successor = wait_taken_over(chart, leader, hung, lease_s)
    wait_seen(kubectl, "orphaned")
    said = wait_for(
        "the old one stands back",
        lambda: re.search(r"Lost (the )?lease.*", logs(chart, leader)),
        timeout_s=30,
        describe=lambda: logs(chart, leader),
    )
    print(said[0])
    assert chart.leader() == successor
