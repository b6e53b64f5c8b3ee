"""What is planned for one LLMDeployment, from the first sight of it to the last child."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from plan_world import CLAIM, CLUSTER, FACTS, JOB_NAME, LLAMA, WORKLOAD, World, described, manifest, served

from quire_contract import names
from quire_contract.model_facts import ModelFacts
from quire_kube.objects import Ref
from quire_operator.plan import acceptance
from quire_operator.plan.actions import Apply, Delete, SetReplicas
from quire_operator.spec.kinds import NETWORK_POLICY, OPTIONAL_KINDS, SERVICE, SERVICE_MONITOR
from quire_operator.spec.settings import parse_settings
from quire_operator.watch.cluster import ClusterFacts


@pytest.fixture(autouse=True)
def _serves_many_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the version whose server uses more than one device; `test_acceptance.py` has what this one refuses."""
    monkeypatch.setattr(acceptance, "_check_one_device", lambda deployment: None)


def test_from_nothing_to_a_workload() -> None:
    world = World()
    first = world.plan()
    assert first.accepted.holds is True
    assert described(first.actions)[:2] == [f"Apply PersistentVolumeClaim/{CLAIM}", f"Apply Job/{JOB_NAME}"]
    assert "Apply Service/m" in described(first.actions)
    assert "Apply Deployment/m" not in described(first.actions)
    assert (first.model_cached.holds, first.fits.holds, first.revision) == (False, None, None)
    world.settle()
    world.download()
    done = world.plan()
    assert done.actions == ()
    assert (done.model_cached.reason, done.fits.holds, done.replicas) == ("Cached", True, 1)
    assert done.facts == FACTS
    assert world.observed.job is None
    assert done.revision == world.workload()["metadata"]["labels"][names.LABEL_REVISION]
    template = world.workload()["spec"]["template"]
    assert template["spec"]["containers"][0]["args"][1] == "/models/b-1234"


def test_the_workload_is_made_in_the_same_round_as_the_facts_are_recorded() -> None:
    world = World()
    world.settle()
    world.add_job_pod("Succeeded", message='{"type":"ModelFacts","path":"b","bytes":1}', exitCode=0)
    texts = described(world.plan().actions)
    assert texts[0] == f"Annotate PersistentVolumeClaim/{CLAIM}"
    assert texts[1] == f"Delete Job/{JOB_NAME}"
    assert texts[-1] == "Apply Deployment/m"


def test_the_workload_comes_after_small_children_and_before_what_is_pruned() -> None:
    world = served()
    world.see(children={ref: child for ref, child in world.observed.children.items() if ref.kind != SERVICE})
    stray = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "m-old", "namespace": "ns", "uid": "uid-old"}}
    ref = Ref(kind=SERVICE, namespace="ns", name="m-old")
    world.see(children={**world.observed.children, ref: stray})
    world.set_spec(engine={"maxModelLen": 2048})
    plan = world.plan()
    assert described(plan.actions)[-2:] == ["Apply Deployment/m", "Delete Service/m-old"]
    assert plan.actions[-1] == Delete(ref=ref, uid="uid-old", reason="Pruned: no longer wanted")


def test_replicas_are_seeded_once() -> None:
    world = World(manifest=manifest({"replicas": None, "scaling": {"min": 2, "max": 3}}))
    plan = world.plan()
    assert isinstance(plan.actions[0], SetReplicas)
    assert (plan.actions[0].replicas, plan.replicas) == (2, 2)
    world.settle()
    assert world.observed.manifest["spec"]["replicas"] == 2


def test_suspended_is_zero_and_keeps_the_number() -> None:
    world = served({"replicas": 2})
    world.set_spec(suspend=True)
    assert world.settle().replicas == 0
    assert world.workload()["spec"]["replicas"] == 0
    assert world.observed.manifest["spec"]["replicas"] == 2


def test_an_edited_child_is_healed_and_said_to_be() -> None:
    world = served()
    edited = copy.deepcopy(world.workload())
    edited["spec"]["template"]["spec"]["containers"][0]["image"] = "evil"
    world.see(children={**world.observed.children, WORKLOAD: edited})
    (action,) = world.plan().actions
    assert isinstance(action, Apply)
    assert action.is_drift
    assert "image" in action.reason
    world.settle()
    assert world.workload()["spec"]["template"]["spec"]["containers"][0]["image"] != "evil"


SMALLER = {"limits": {"cpu": "2", "memory": "8Gi"}}


def test_a_changed_spec_is_no_drift() -> None:
    world = served()
    world.set_spec(engine={"maxModelLen": 2048})
    changed = [action for action in world.plan().actions if isinstance(action, Apply)]
    assert changed
    assert not any(action.is_drift for action in changed)
    container = "spec.template.spec.containers[server]"
    assert changed[-1].reason == f"Changed: {container}.args", "and nothing of the operator's own marks"
    world.settle()
    world.set_spec(
        engine={"maxModelLen": 2048, "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
        resources=SMALLER,
    )
    (workload,) = (action for action in world.plan().actions if isinstance(action, Apply))
    assert workload.reason == (
        f"Changed: {container}.env[OMP_NUM_THREADS].value, {container}.env[A], {container}.env[B] and 1 more"
    )
    world.settle()
    world.set_spec(engine={"maxModelLen": 2048}, resources=SMALLER)
    (workload,) = (action for action in world.plan().actions if isinstance(action, Apply))
    assert workload.reason == "Changed: what is no longer asked for was taken out"


def test_a_deleted_child_is_made_again() -> None:
    world = served()
    world.see(children={ref: c for ref, c in world.observed.children.items() if ref.kind != NETWORK_POLICY})
    (action,) = world.plan().actions
    assert isinstance(action, Apply)
    assert action.reason == "Created"


def test_a_child_on_its_way_out_is_waited_for() -> None:
    world = served()
    ending = copy.deepcopy(world.workload())
    ending["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    ending["spec"]["strategy"] = {"type": "Recreate"}
    world.see(children={**world.observed.children, WORKLOAD: ending})
    assert world.plan().actions == ()


@pytest.mark.parametrize(
    ("spec", "reason", "field"),
    [
        ({"resources": None, "profile": "h100"}, "UnknownProfile", "spec.profile"),
        ({"resources": {"limits": {"memory": "8Gb"}}}, "InvalidSpec", "spec.resources.limits[memory]"),
        (
            {"resources": {"limits": {"memory": "1Gi"}, "requests": {"memory": "2Gi"}}},
            "InvalidResources",
            "spec.resources.requests[memory]",
        ),
        ({"cache": {"existingClaim": "mine"}}, "ClaimMissing", "spec.cache.existingClaim"),
        ({"model": {"uri": "pvc://mine/path"}}, "ClaimMissing", "spec.model.uri"),
        ({"model": {"uri": "file:///models/x"}}, "UnsupportedModelUri", "spec.model.uri"),
        ({"model": {"uri": "oci://r.io/model:1"}}, "ImageVolumesUnsupported", "spec.model.uri"),
        ({"podTemplate": {"spec": {"containers": "x"}}}, "InvalidPodTemplate", "spec.podTemplate"),
        (
            {"podTemplate": {"spec": {"nodeSelector": ["x"]}}},
            "InvalidPodTemplate",
            "spec.podTemplate.spec.nodeSelector",
        ),
        ({"podTemplate": {"spec": {"affinity": []}}}, "InvalidPodTemplate", "spec.podTemplate.spec.affinity"),
        ({"observability": {"serviceMonitor": "always"}}, "ServiceMonitorMissing", "spec.observability.serviceMonitor"),
        ({"adapters": [{"name": "sql", "uri": "hf://a/lora"}]}, "NotSupported", "spec.adapters"),
        ({"expose": {"ingress": {"host": "llm.example"}}}, "NotSupported", "spec.expose.ingress"),
        ({"expose": {"inferencePool": True}}, "NotSupported", "spec.expose.inferencePool"),
        ({"scaling": {"mode": "HPA"}}, "ScalingModeUnsupported", "spec.scaling.mode"),
        (
            {"scaling": {"schedules": [{"start": "0 8 * * 1-9", "end": "0 18 * * *", "min": 1}]}},
            "InvalidSpec",
            "spec.scaling.schedules[0].start",
        ),
        ({"access": {"apiKeysSecretRef": {"name": "keys"}}}, "NotSupported", "spec.access.apiKeysSecretRef"),
        ({"engine": {"quantization": "awq"}}, "NotSupported", "spec.engine.quantization"),
        ({"engine": {"kvCacheDtype": "fp8"}}, "NotSupported", "spec.engine.kvCacheDtype"),
        ({"engine": {"speculative": {"method": "ngram"}}}, "NotSupported", "spec.engine.speculative"),
        ({"engine": {"pipelineParallelSize": 2}}, "LeaderWorkerSetMissing", "spec.engine"),
        (
            {"engine": {"tensorParallelSize": 3}, "resources": {"limits": {"nvidia.com/gpu": 2}}},
            "InvalidSpec",
            "spec.engine.tensorParallelSize",
        ),
        ({"engine": {"extraArgs": ["--port", "80"]}}, "InvalidSpec", "spec.engine.extraArgs[0]"),
        ({"engine": {"extraArgs": ["--block-size", "x"]}}, "InvalidSpec", "spec.engine.extraArgs"),
        ({"engine": {"extraArgs": ["--max_num_batched_tokens=8"]}}, "InvalidSpec", "spec.engine.extraArgs"),
        ({"engine": {"maxModelLen": "many"}}, "InvalidSpec", "spec.engine.maxModelLen"),
    ],
)
def test_a_spec_that_cannot_work_touches_nothing(spec: dict[str, Any], reason: str, field: str) -> None:
    world = World(manifest=manifest(spec))
    plan = world.plan()
    assert plan.accepted.holds is False
    assert plan.accepted.reason == reason
    assert plan.accepted.message.startswith(field)
    assert plan.actions == ()
    good = served({"replicas": 2})
    good.see(manifest=manifest(spec), volume=None if reason == "ClaimMissing" else good.observed.volume)
    after = good.plan()
    assert after.actions == ()
    assert after.replicas == 2


def test_a_claim_that_appears_is_taken() -> None:
    world = World(manifest=manifest({"cache": {"existingClaim": "mine"}}))
    assert world.plan().model_cached.reason == "ClaimMissing"
    claim = {"name": "mine", "namespace": "ns", "uid": "uid-claim"}
    world.see(
        volume={
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": claim,
            "spec": {"resources": {"requests": {"storage": "10Gi"}}},
            "status": {"phase": "Bound"},
        }
    )
    assert world.plan().accepted.holds is True
    world.download()
    assert world.plan().model_cached.holds is True


def test_the_mode_of_a_live_claim_decides_where_pods_run() -> None:
    world = served()
    assert "affinity" in world.workload()["spec"]["template"]["spec"]
    world.set_spec(cache={"accessMode": "ReadWriteMany"})
    assert world.plan().actions == ()


def test_an_image_needs_neither_volume_nor_job() -> None:
    world = World(
        manifest=manifest({"model": {"uri": "oci://r.io/model:1"}}), cluster=replace(CLUSTER, version=(1, 35))
    )
    plan = world.step()
    assert plan.model_cached.reason == "ImageVolume"
    assert (plan.fits.holds, plan.fits.reason) == (None, "ModelUnknown")
    assert "Apply Deployment/m" in described(plan.actions)
    assert not any("Claim" in text or "Job" in text for text in described(plan.actions))


def test_a_model_that_does_not_fit_gets_no_workload() -> None:
    world = World(manifest=manifest({"resources": {"limits": {"memory": "3Gi"}}}))
    world.download()
    plan = world.plan()
    assert plan.fits.holds is False
    assert plan.fits.reason == "OutOfMemory"
    assert plan.fit is not None
    assert WORKLOAD not in world.observed.children
    assert plan.revision is None


def test_a_closed_gate_leaves_the_workload_but_for_its_replicas() -> None:
    world = served({"replicas": 2})
    before = world.workload()
    world.set_spec(model={"uri": "hf://a/other"}, replicas=1)
    world.see(volume=None, job=None, job_pods=())
    plan = world.plan()
    assert plan.model_cached.holds is False
    touched = [a for a in plan.actions if (not isinstance(a, Apply)) and a.ref == WORKLOAD]
    assert touched == [SetReplicas(ref=WORKLOAD, replicas=1, reason="Changed: spec.replicas")]
    world.settle()
    assert world.workload()["spec"]["template"] == before["spec"]["template"]
    assert world.workload()["spec"]["replicas"] == 1


def test_learning_a_load_budget_rolls_nothing_out() -> None:
    world = served()
    world.set_status(coldStart={"recentSeconds": [30, 900.4]})
    assert world.plan().actions == ()
    world.set_spec(engine={"maxModelLen": 2048})
    world.settle()
    assert world.workload()["metadata"]["annotations"][names.ANNOTATION_LOAD_BUDGET] == "2702"


@pytest.mark.parametrize(
    ("mode", "settings", "kinds", "holds", "reason"),
    [
        ("Off", {"routesThroughGateway": True}, OPTIONAL_KINDS, False, "Disabled"),
        ("Auto", {}, OPTIONAL_KINDS, False, "NoGateway"),
        ("Auto", {"routesThroughGateway": True}, OPTIONAL_KINDS, True, "KEDA"),
        ("KEDA", {"routesThroughGateway": True}, (), False, "KEDAMissing"),
        ("Auto", {"routesThroughGateway": True}, (), False, "NoScaler"),
    ],
)
def test_who_scales(mode: str, settings: dict[str, Any], kinds: Any, holds: bool, reason: str) -> None:
    world = World(
        manifest=manifest({"scaling": {"mode": mode}}),
        settings=parse_settings(settings),
        cluster=ClusterFacts(kinds=frozenset(kinds)),
    )
    plan = world.plan()
    assert (plan.autoscaling.holds, plan.autoscaling.reason) == (holds, reason)
    applies_scaler = "Apply ScaledObject/m" in described(plan.actions)
    assert applies_scaler is holds


def test_a_kind_that_goes_away_with_its_api_is_no_error() -> None:
    world = served(cluster=replace(CLUSTER, kinds=frozenset({SERVICE_MONITOR})))
    assert any(ref.kind == SERVICE_MONITOR for ref in world.observed.children)
    world.cluster = CLUSTER
    world.see(children={ref: c for ref, c in world.observed.children.items() if ref.kind != SERVICE_MONITOR})
    assert world.plan().actions == ()


def test_an_unknown_architecture_is_served_all_the_same() -> None:
    world = World()
    world.download(ModelFacts(path="b", bytes=5, shape_error="model_type 'x' is not known"))
    plan = world.plan()
    assert (plan.fits.holds, plan.fits.reason) == (None, "ArchitectureUnknown")
    assert WORKLOAD in world.observed.children
    assert LLAMA["model_type"] not in plan.fits.message
