"""What holds a deployment back and is no fault of its pods: a person's pause, a paused Deployment, a missing claim."""

from dataclasses import replace

import pytest
from status_objects import (
    NOW,
    build_manifest,
    build_observed,
    build_plan,
    build_pod,
    build_service,
    build_workload,
    check,
    derive,
    look,
    rolled_out,
    shown_condition,
    unschedulable,
)

from quire_kube.objects import Manifest
from quire_operator.plan.actions import Verdict
from quire_operator.plan.plan import plan
from quire_operator.spec.kinds import SERVICE
from quire_operator.spec.settings import Settings
from quire_operator.status.transitions import build_events
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed

PAUSED = "Paused: quire.dev/paused is true: nothing is changed or healed until it is removed"


def _paused(workload: Manifest) -> Manifest:
    return {**workload, "spec": {**workload["spec"], "paused": True}}


@pytest.mark.parametrize(("withheld", "status"), [(0, "True"), (2, "False")])
def test_a_pause_is_shown_and_ready_goes_on_telling_the_truth(withheld: int, status: str) -> None:
    observed = build_observed(build_pod(ready=True), workload=rolled_out())
    paused = build_plan(is_paused=True, num_withheld=withheld)
    assert look(observed, paused) == ("Ready", PAUSED, ("True", "Serving"))
    assert shown_condition(derive(observed, paused), "RolloutComplete") == (status, "Paused")


def test_what_is_wrong_is_said_before_that_it_is_paused() -> None:
    assert look(build_observed(unschedulable()), build_plan(is_paused=True))[1].startswith("InsufficientGPU: ")


def test_a_hot_fix_that_leads_clients_away_is_said_before_that_it_is_paused() -> None:
    observed = build_observed(build_pod(ready=True), workload=rolled_out())
    misled = {
        ref: build_service(selector={"a": "b"}) if ref.kind == SERVICE else child
        for ref, child in observed.children.items()
    }
    said = look(replace(observed, children=misled), build_plan(is_paused=True))
    assert said[1].startswith("ServiceMisled: ")
    assert said[2] == ("False", "ServiceMisled")


def test_pause_and_its_end_are_events_and_no_warnings() -> None:
    observed = build_observed(build_pod(ready=True), workload=rolled_out())
    before, during = derive(observed), derive(observed, build_plan(is_paused=True, num_withheld=1))
    check(during)

    def said(old: Manifest, new: Manifest) -> list[tuple[str, str]]:
        return [(one["type"], one["reason"]) for one in build_events(observed.manifest, old, new, (), (), NOW)]

    assert said(before, during) == [("Normal", "Paused")]
    assert sorted(said(during, before)) == [("Normal", "Resumed"), ("Normal", "RolloutComplete")]


def test_a_paused_deployment_that_has_to_roll_is_named_with_the_command() -> None:
    old = build_pod(revision="old", ready=True)
    observed = build_observed(old, workload=_paused(build_workload()))
    cure = "Deployment smollm2 is paused, so that no new pods are made; kubectl rollout resume deployment/smollm2"
    assert look(observed) == ("Updating", f"RolloutBlocked: DeploymentPaused: {cure}", ("True", "Serving"))
    nothing = build_observed(workload=_paused(build_workload()))
    assert look(nothing) == ("Failed", f"DeploymentPaused: {cure}", ("False", "DeploymentPaused"))


def test_a_paused_deployment_that_has_nothing_to_roll_does_no_harm() -> None:
    assert look(build_observed(build_pod(ready=True), workload=_paused(rolled_out())))[1] == ""
    scaling = build_observed(build_pod(ready=True), workload=_paused(build_workload(replicas=2)))
    assert look(scaling, build_plan(replicas=2))[1] == "", "a paused Deployment scales all the same"


@pytest.mark.parametrize(
    "spec", [{"model": {"uri": "pvc://nowhere/m"}}, {"model": {"uri": "nonsense"}}, {"cache": {"existingClaim": "x"}}]
)
def test_a_new_object_that_is_refused_is_not_scaled_to_zero(spec: Manifest) -> None:
    observed = Observed(manifest=build_manifest(spec))
    status = derive(observed, plan(observed, ClusterFacts(), Settings(), NOW))
    shown = [condition["reason"] for condition in status["conditions"]]
    assert "ScaledToZero" not in shown
    assert shown_condition(status, "Scheduled") == ("Unknown", "NotAccepted")


def test_a_claim_that_is_deleted_while_pods_serve_from_it_is_said() -> None:
    verdict = Verdict(holds=False, reason="VolumeDeleted", message="PersistentVolumeClaim c is being deleted")
    observed = build_observed(build_pod(ready=True), workload=rolled_out())
    said = look(observed, build_plan(model_cached=verdict, revision=None))
    assert said[1:] == ("RolloutBlocked: VolumeDeleted: PersistentVolumeClaim c is being deleted", ("True", "Serving"))
