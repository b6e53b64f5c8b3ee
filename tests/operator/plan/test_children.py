"""What a spec says of the objects made for a model, beyond the golden files: who wins, and which laws stay."""

from typing import Any

import pytest
from plan_world import World, manifest

from quire_contract import names
from quire_kube.objects import Manifest, Ref
from quire_operator.spec.kinds import DEPLOYMENT, NETWORK_POLICY, OWNED_KINDS, SERVICE, SERVICE_ACCOUNT

LABELLED = {"labels": {"team": "search"}, "annotations": {"example.com/owner": "ml"}}


def served(spec: dict[str, Any] | None = None) -> World:
    world = World(manifest=manifest(spec))
    world.download()
    world.settle()
    return world


def child(world: World, kind: Any) -> Manifest:
    return world.observed.children[Ref(kind=kind, namespace="ns", name="m")]


def pod(world: World) -> Manifest:
    template: Manifest = child(world, DEPLOYMENT)["spec"]["template"]
    return template


def test_every_object_inherits_and_is_left_alone_afterwards() -> None:
    world = served({"inheritedMetadata": LABELLED})
    objects = [*world.observed.children.values(), pod(world), world.observed.volume]
    assert {ref.kind for ref in world.observed.children} <= set(OWNED_KINDS)
    for document in objects:
        assert document is not None
        assert document["metadata"]["labels"]["team"] == "search"
        assert document["metadata"]["annotations"]["example.com/owner"] == "ml"
    assert world.plan().actions == ()


def test_what_is_inherited_never_enters_a_selector() -> None:
    """A Deployment's selector cannot be changed, and a Service's would lose the pods of before."""
    world = served({"inheritedMetadata": LABELLED})
    selectors = [
        child(world, DEPLOYMENT)["spec"]["selector"]["matchLabels"],
        child(world, SERVICE)["spec"]["selector"],
        child(world, NETWORK_POLICY)["spec"]["podSelector"]["matchLabels"],
    ]
    assert selectors == [names.selector_labels("m")] * 3


def test_the_pods_own_template_wins_over_what_is_inherited() -> None:
    template = {"metadata": {"labels": {"team": "ads"}, "annotations": {"example.com/owner": None}}}
    world = served({"inheritedMetadata": LABELLED, "podTemplate": template})
    assert pod(world)["metadata"]["labels"]["team"] == "ads"
    assert "example.com/owner" not in pod(world)["metadata"]["annotations"]


def test_another_label_reaches_what_is_there_already() -> None:
    world = served({"inheritedMetadata": LABELLED})
    world.set_spec(inheritedMetadata={"labels": {"team": "ads"}})
    world.settle()
    assert {c["metadata"]["labels"]["team"] for c in world.observed.children.values()} == {"ads"}


def test_a_named_account_gets_no_token_and_ours_stays_for_the_pods_of_before() -> None:
    world = served({"serviceAccount": {"name": "mine"}})
    assert pod(world)["spec"]["serviceAccountName"] == "mine"
    assert pod(world)["spec"]["automountServiceAccountToken"] is False
    assert child(world, SERVICE_ACCOUNT)["automountServiceAccountToken"] is False


@pytest.mark.parametrize("kind", ["NodePort", "LoadBalancer"])
def test_a_service_for_the_outside_is_let_through_and_pods_still_reach_nothing(kind: str) -> None:
    """What comes from outside the cluster matches no `namespaceSelector` (NetworkPolicyPeer)."""
    world = served({"service": {"type": kind}})
    policy = child(world, NETWORK_POLICY)["spec"]
    assert policy["ingress"] == [{"ports": [{"port": 8000, "protocol": "TCP"}]}]
    assert policy["egress"] == []
    world.set_spec(service={"type": "ClusterIP"})
    world.settle()
    assert child(world, NETWORK_POLICY)["spec"]["ingress"][0]["from"] == [{"namespaceSelector": {}}]


def test_the_headless_service_stays_within_the_cluster() -> None:
    world = served({"service": {"type": "LoadBalancer", "annotations": {"a": "b"}}})
    pods_service = world.observed.children[Ref(kind=SERVICE, namespace="ns", name="m-pods")]
    assert pods_service["spec"]["type"] == "ClusterIP"
    assert "a" not in pods_service["metadata"]["annotations"]
