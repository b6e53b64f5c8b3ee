"""Two operators and one leader: when it dies, the other takes over within the Lease's time."""

import time

from support.chart import Chart
from support.kubectl import Kubectl, wait_for
from support.manifests import llm


def test_the_other_takes_over(kubectl: Kubectl, chart: Chart) -> None:
    pods = {pod["metadata"]["name"] for pod in chart.operator_pods()}
    assert len(pods) == 2
    leader = chart.leader()
    assert leader in pods
    lease_s = chart.lease()["spec"]["leaseDurationSeconds"]
    chart.kubectl("delete", "pod", leader, "--grace-period=0", "--force")
    killed = time.monotonic()
    kubectl.apply(llm("orphaned"))
    wait_for("another leader", lambda: chart.leader() not in ("", leader), timeout_s=lease_s + 15, every_s=0.1)
    took_s = time.monotonic() - killed
    assert chart.leader() in {pod["metadata"]["name"] for pod in chart.operator_pods()}
    wait_for(
        "the new leader works",
        lambda: kubectl.llm("orphaned").get("status", {}).get("conditions"),
        timeout_s=30,
        describe=kubectl.describe_all,
    )
    print(f"\ntaken over after {took_s:.1f} s (Lease of {lease_s} s)")
    assert took_s <= lease_s + 5
    chart.wait_ready()
