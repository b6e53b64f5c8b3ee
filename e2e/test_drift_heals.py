"""Whoever edits or deletes a child sees it put back within seconds, and an Event that says so."""

import pytest
from support.kubectl import Kubectl, wait_for
from support.manifests import llm
from support.traffic import ask, start_client, wait_ready

CHILDREN = (
    ("deployment", "drifting", {"spec": {"progressDeadlineSeconds": 7}}),
    ("deployment", "drifting", {"spec": {"replicas": 3}}),
    ("service", "drifting", {"spec": {"selector": {"quire.dev/deployment": "another"}}}),
    ("service", "drifting", {"spec": {"ports": [{"name": "http", "port": 81, "targetPort": 8000}]}}),
    ("service", "drifting-pods", {"spec": {"publishNotReadyAddresses": False}}),
    ("poddisruptionbudget", "drifting", {"spec": {"maxUnavailable": 0}}),
    ("networkpolicy", "drifting", {"spec": {"policyTypes": ["Ingress"]}}),
    ("serviceaccount", "drifting", {"automountServiceAccountToken": True}),
)


def leaf(path: dict, found: dict) -> object:
    """The value in `found` at the one path of a patch."""
    while isinstance(path, dict):
        key, path = next(iter(path.items()))
        found = (found or {}).get(key)  # type: ignore[assignment]
    return found


def test_edits_and_deletions_heal(kubectl: Kubectl, server_image: str, subtests: pytest.Subtests) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("drifting"))
    wait_ready(kubectl, "drifting")
    for kind, name, patch in CHILDREN:
        with subtests.test(f"edit {kind} {name}: {patch}"):
            before = kubectl.get(kind, name)
            assert before is not None
            kubectl.patch(kind, name, patch)
            wait_for(
                f"{kind} {name} is as before",
                lambda kind=kind, name=name, patch=patch, before=before: (
                    leaf(patch, kubectl.get(kind, name)) == leaf(patch, before)
                ),
                timeout_s=20,
                describe=kubectl.describe_all,
            )
    for kind, name in dict.fromkeys((kind, name) for kind, name, _ in CHILDREN):
        with subtests.test(f"delete {kind} {name}"):
            before = kubectl.get(kind, name)
            assert before is not None
            kubectl("delete", kind, name, "--wait=false")
            wait_for(
                f"{kind} {name} is back",
                lambda kind=kind, name=name, before=before: (
                    (kubectl.get(kind, name) or before)["metadata"]["uid"] != before["metadata"]["uid"]
                ),
                timeout_s=20,
                describe=kubectl.describe_all,
            )
    wait_ready(kubectl, "drifting")
    assert ask(kubectl, "drifting", "Hello")["chunks"] > 0
    said = [
        f"{event['reason']} {event['message']}"
        for event in kubectl.events()
        if event["involvedObject"]["kind"] == "LLMDeployment"
    ]
    assert any(line.startswith("Healed Deployment drifting: spec.progressDeadlineSeconds") for line in said), said
    assert any(line.startswith("Created") and "Service drifting" in line for line in said), said
