"""How `quire up` feeds the pure scaling function."""

from typing import Any

import pytest

from quire_cli.local.differences import differences
from quire_cli.local.scaler import Scaler
from quire_cli.local.supervisor import limits_environment, restart_delay
from quire_gateway.demand import Demand
from quire_operator.spec.llm_deployment import LLMDeployment


def deployment(**spec: Any) -> LLMDeployment:
    base: dict[str, Any] = {"model": {"uri": "hf://a/b"}, "resources": {"limits": {"cpu": 1}}}
    return LLMDeployment.from_manifest({"metadata": {"name": "m"}, "spec": {**base, **spec}})


def test_it_starts_with_what_the_manifest_asks_for() -> None:
    assert Scaler(deployment(replicas=3), 0.0).wanted == 3
    assert Scaler(deployment(), 0.0).wanted == 1
    assert Scaler(deployment(scaling={"min": 2, "max": 4}), 0.0).wanted == 2


def test_suspend_means_zero_and_off_means_the_manifest() -> None:
    suspended = Scaler(deployment(suspend=True), 0.0)
    assert suspended.update(deployment(suspend=True), Demand(waiting=5), 0, 1.0)
    assert (suspended.wanted, suspended.reason) == (0, "suspended")
    off = deployment(replicas=2, scaling={"mode": "Off"})
    assert not Scaler(off, 0.0).update(off, Demand(waiting=500), 2, 1.0)


def test_demand_wakes_and_idleness_ends() -> None:
    given = deployment(replicas=0, scaling={"min": 0, "max": 4, "idleToZeroAfter": "10s"})
    scaler = Scaler(given, 0.0)
    assert not scaler.update(given, Demand(), 0, 1.0)
    assert scaler.update(given, Demand(waiting=1), 0, 2.0)
    assert scaler.wanted == 1
    assert not scaler.update(given, Demand(last_demand=3.0), 1, 12.9)
    assert scaler.update(given, Demand(last_demand=3.0), 1, 13.0)
    assert scaler.wanted == 0


@pytest.mark.parametrize(("failures", "delay"), [(0, 0.0), (1, 1.0), (2, 2.0), (4, 8.0), (50, 60.0)])
def test_restarts_back_off(failures: int, delay: float) -> None:
    assert restart_delay(failures) == delay


def test_limits_are_passed_on_as_numbers() -> None:
    given = deployment(resources={"limits": {"cpu": "1500m", "memory": "2Gi", "nvidia.com/gpu": 1}})
    assert limits_environment(given) == {"QUIRE_CPU_LIMIT": "1.5", "QUIRE_MEMORY_LIMIT": str(2 << 30)}
    by_profile = LLMDeployment.from_manifest(
        {"metadata": {"name": "m"}, "spec": {"model": {"uri": "hf://a/b"}, "profile": "p"}}
    )
    assert limits_environment(by_profile) == {}


def test_what_means_something_else_without_a_cluster_is_said() -> None:
    assert differences(deployment()) == []
    given = deployment(
        resources={"limits": {"nvidia.com/gpu": 1}},
        access={"apiKeysSecretRef": {"name": "keys"}},
        podTemplate={"spec": {"nodeSelector": {"a": "b"}}},
    )
    assert [sentence.partition(":")[0] for sentence in differences(given)] == [
        "spec.access.apiKeysSecretRef",
        "spec.resources.limits",
        "spec.podTemplate",
    ]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"cache": {"existingClaim": "models"}}, "spec.cache"),
        ({"image": "registry.example/server:1"}, "spec.image"),
        ({"imagePullSecrets": [{"name": "registry"}]}, "spec.imagePullSecrets"),
        ({"serviceAccount": {"name": "mine"}}, "spec.serviceAccount"),
        ({"inheritedMetadata": {"labels": {"team": "search"}}}, "spec.inheritedMetadata"),
        ({"service": {"type": "LoadBalancer"}}, "spec.service"),
        ({"service": {"annotations": {"a": "b"}}}, "spec.service"),
        ({"download": {"env": [{"name": "HTTPS_PROXY", "value": "http://proxy"}]}}, "spec.download"),
    ],
)
def test_what_is_about_a_clusters_objects_is_said_too(spec: dict[str, Any], field: str) -> None:
    assert [sentence.partition(":")[0] for sentence in differences(deployment(**spec))] == [field]
