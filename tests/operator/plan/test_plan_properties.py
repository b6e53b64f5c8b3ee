"""What holds for every plan, whatever is observed: sequences of things that happen in a cluster, in any order."""

import copy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from plan_world import FACTS, GIB, NOW, World, manifest

from quire_contract import model_facts, names
from quire_contract.model_facts import encode_facts
from quire_kube.times import format_time
from quire_operator.plan.actions import Apply, Delete, SetReplicas
from quire_operator.spec.kinds import DEPLOYMENT, JOB, LLM_DEPLOYMENT, PERSISTENT_VOLUME_CLAIM, ref_of
from quire_operator.spec.settings import parse_settings

BAD: list[dict[str, Any]] = [
    {"scaling": {"mode": "HPA"}},
    {"model": {"uri": "file:///x"}},
    {"podTemplate": {"spec": []}},
    {"engine": {"extraArgs": ["--config=x"]}},
]
GOOD: list[dict[str, Any]] = [
    {"replicas": 0},
    {"replicas": 3, "scaling": {"max": 3}},
    {"suspend": True},
    {"suspend": False},
    {"engine": {"maxModelLen": 1024}},
    {"engine": {"maxModelLen": 131072}, "resources": {"limits": {"memory": "3Gi"}}},
    {"resources": {"limits": {"memory": "16Gi"}}},
    {"rollout": {"strategy": "Replace"}},
    {"rollout": {"strategy": "Surge"}},
    {"model": {"uri": "hf://a/b", "tokenSecretRef": {"name": "hf"}}},
    {"cache": {"size": "40Gi", "retain": False}},
    {"access": {"networkPolicy": "Open"}},
    {"cache": {"accessMode": "ReadWriteMany"}},
    {"service": {"type": "NodePort"}, "serviceAccount": {"name": "mine"}, "image": "registry.example/server:1"},
    {"inheritedMetadata": {"labels": {"team": "search"}}, "download": {"env": [{"name": "A", "value": "1"}]}},
    {"resources": None, "profiles": ["a", "tiny", "b"]},
]
HAPPENINGS = st.sampled_from(
    [
        *("time", "fail", "no space", "job failed", "job done", "succeed"),
        *("pod", "stuck pod", "drift", "loss", "users", "loads"),
    ]
)


def happen(world: World, what: str) -> None:
    """Let something happen that no plan has done."""
    has_job, has_workload = world.observed.job is not None, any(r.kind == DEPLOYMENT for r in world.observed.children)
    match what:
        case "time":
            world.now += 400
        case "fail" if has_job:
            world.fail_job_pod(model_facts.SOURCE_UNREACHABLE)
        case "no space" if has_job:
            world.fail_job_pod(model_facts.NO_SPACE, need_bytes=30 * GIB, have_bytes=GIB)
        case "job failed" if has_job:
            world.end_job("Failed")
        case "job done" if has_job:
            world.end_job("Complete")
        case "succeed" if has_job:
            world.add_job_pod("Succeeded", message=encode_facts(FACTS).decode(), exitCode=0)
        case "pod" if has_workload:
            world.add_pod()
        case "stuck pod" if has_workload:
            world.add_pod(is_ready=False, unschedulable_since=world.now)
        case "drift" if has_workload:
            edited = copy.deepcopy(world.workload())
            edited["spec"]["strategy"] = {"type": "Recreate"}
            world.see(children={**world.observed.children, ref_of(edited): edited})
        case "loss":
            world.see(children=dict(list(world.observed.children.items())[1:]))
        case "users":
            world.see(other_cache_users=frozenset() if world.observed.other_cache_users else frozenset({"other"}))
        case "loads":
            world.see(loads={pod["metadata"]["name"]: 1 for pod in world.observed.pods})


STEPS = st.lists(st.one_of(HAPPENINGS, st.sampled_from(GOOD)), max_size=12)


SETTINGS = parse_settings(
    {
        "profiles": {
            "a": {"resources": {"limits": {"memory": "16Gi"}}, "nodeSelector": {"pool": "a"}},
            "tiny": {"resources": {"limits": {"memory": "1Gi"}}},
            "b": {"resources": {"limits": {"memory": "8Gi"}}},
        }
    }
)


def play(steps: list[Any]) -> World:
    """Let things happen, a plan being carried out and the status written after each."""
    world = World(manifest=manifest(), settings=SETTINGS)
    for step in steps:
        if isinstance(step, str):
            happen(world, step)
        else:
            world.set_spec(**({"profiles": None} if "resources" in step else {}) | step)
        plan = world.step()
        before = world.observed.manifest["status"].get("activeProfile", {})
        if plan.profile is not None and before.get("name") != plan.profile:
            world.set_status(activeProfile={"name": plan.profile, "since": format_time(world.now)})
    return world


quick = settings(max_examples=120)


@quick
@given(steps=STEPS)
def test_a_plan_that_was_carried_out_leaves_nothing_to_plan(steps: list[Any]) -> None:
    world = play(steps)
    world.settle()
    assert world.plan().actions == ()


@quick
@given(steps=STEPS)
def test_the_same_input_gives_the_same_plan_and_is_not_changed(steps: list[Any]) -> None:
    world = play(steps)
    before = copy.deepcopy(world.observed)
    first = world.plan()
    assert world.observed == before
    assert world.plan() == first


@quick
@given(steps=STEPS, bad=st.sampled_from(BAD))
def test_a_refused_spec_gives_no_action(steps: list[Any], bad: dict[str, Any]) -> None:
    world = play(steps)
    world.set_spec(**bad)
    plan = world.plan()
    assert plan.accepted.holds is False
    assert plan.actions == ()


@quick
@given(steps=STEPS)
def test_a_closed_gate_touches_no_workload_but_its_replicas(steps: list[Any]) -> None:
    world = play(steps)
    plan = world.plan()
    if plan.model_cached.holds is True and plan.fits.holds is not False:
        world.set_spec(model={"uri": "hf://a/another"})
        world.see(volume=None, job=None, job_pods=())
        plan = world.plan()
    for action in plan.actions:
        ref = ref_of(action.manifest) if isinstance(action, Apply) else action.ref
        assert ref.kind != DEPLOYMENT or isinstance(action, SetReplicas)


@quick
@given(steps=STEPS, uri=st.sampled_from(["hf://a/b", "pvc://mine/b"]))
def test_a_users_claim_is_neither_deleted_nor_applied_and_no_volume_ever_is_deleted(steps: list[Any], uri: str) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "mine", "namespace": "ns", "uid": "uid-mine"},
        "spec": {"resources": {"requests": {"storage": "1Gi"}}, "storageClassName": "fast"},
        "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}},
    }
    cache = {} if uri.startswith("pvc") else {"existingClaim": "mine"}
    world = World(manifest=manifest({"model": {"uri": uri}, "cache": cache}))
    world.see(volume=claim)
    for step in steps:
        if isinstance(step, str):
            happen(world, step)
        elif "model" not in step and "cache" not in step:
            world.set_spec(**step)
        for action in world.step().actions:
            ref = ref_of(action.manifest) if isinstance(action, Apply) else action.ref
            assert ref.kind != PERSISTENT_VOLUME_CLAIM or not isinstance(action, Apply | Delete)
    assert world.observed.volume is not None
    added = set(world.observed.volume["metadata"].get("annotations", {}))
    ours = (names.ANNOTATION_FACTS_PREFIX, names.ANNOTATION_ATTEMPT_PREFIX)
    assert all(name.startswith(ours) for name in added)


@quick
@given(steps=STEPS)
def test_only_what_is_owned_or_shared_is_deleted_and_waits_are_ahead(steps: list[Any]) -> None:
    world = play(steps)
    world.set_status(rolloutWaitingSince=format_time(NOW - 1))
    plan = world.plan()
    for action in plan.actions:
        if isinstance(action, Delete):
            assert action.ref.kind == JOB or action.ref in world.observed.children
        if isinstance(action, SetReplicas):
            assert action.ref.kind in (LLM_DEPLOYMENT, DEPLOYMENT)
    assert plan.requeue_after_s is None or plan.requeue_after_s > 0
