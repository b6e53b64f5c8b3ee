"""`quire.dev/paused` holds everything as it is; `quire.dev/retry-at` asks for another try. Both are a person's word."""

import copy

import pytest
from plan_world import WORKLOAD, World, attempt, described, downloading, manifest, served

from quire_contract import model_facts, names
from quire_kube.objects import Ref
from quire_kube.times import format_time
from quire_operator.spec.kinds import SERVICE


def annotate(world: World, **annotations: str) -> None:
    changed = copy.deepcopy(world.observed.manifest)
    changed["metadata"]["annotations"] = {
        f"quire.dev/{name.replace('_', '-')}": text for name, text in annotations.items()
    }
    world.see(manifest=changed)


def test_a_paused_deployment_is_neither_healed_nor_changed_nor_scaled() -> None:
    world = served()
    annotate(world, paused="true")
    assert world.plan().num_withheld == 0
    workload = copy.deepcopy(world.workload())
    workload["spec"]["template"]["spec"]["containers"][0]["image"] = "hot/fix"
    children = {**world.observed.children, WORKLOAD: workload}
    del children[Ref(kind=SERVICE, namespace="ns", name="m")]
    world.see(children=children)
    world.set_spec(replicas=3, engine={"maxModelLen": 2048})
    plan = world.plan()
    assert plan.actions == ()
    assert plan.is_paused
    assert (plan.num_withheld, plan.replicas, plan.accepted.holds) == (2, 3, True)
    annotate(world, paused="false")
    assert set(described(world.plan().actions)) == {"Apply Service/m", "Apply Deployment/m"}


def test_a_paused_deployment_starts_no_download() -> None:
    world = World(manifest=manifest())
    annotate(world, paused="true")
    plan = world.plan()
    assert plan.actions == ()
    assert plan.model_cached.reason == "VolumePending"


def test_only_the_word_true_pauses() -> None:
    for text in ("", "yes", "True", "false"):
        world = World(manifest=manifest())
        annotate(world, paused=text)
        assert world.plan().actions != ()


def test_a_failed_download_is_tried_again_when_a_person_asks() -> None:
    world = downloading()
    for _ in range(4):
        world.fail_job_pod(model_facts.MODEL_GATED)
        world.end_job("Failed")
        world.now += world.settle().requeue_after_s or 0.0
        world.settle()
    world.fail_job_pod(model_facts.MODEL_GATED)
    world.end_job("Failed")
    assert world.settle().requeue_after_s == 240
    annotate(world, retry_at=format_time(world.now + 7))
    assert world.settle().requeue_after_s == 7
    world.now += 7
    world.settle()
    assert attempt(world) == "6"
    world.fail_job_pod(model_facts.MODEL_GATED)
    world.end_job("Failed")
    assert world.settle().requeue_after_s == 300, "it was asked for once"


def test_a_job_that_waits_between_its_own_tries_is_made_anew_when_asked() -> None:
    world = downloading()
    world.fail_job_pod(model_facts.SOURCE_UNREACHABLE)
    assert world.plan().actions == ()
    world.now += 20
    annotate(world, retry_at=format_time(world.now))
    assert [text.split("/")[0] for text in described(world.plan().actions)] == ["Delete Job"]
    world.settle()
    assert world.observed.job_pods == ()
    assert world.plan().actions == ()


@pytest.mark.parametrize("text", ["now", "", "2026-01-31", "1764288000", "2026-01-31T12:00:00"])
def test_what_is_no_time_is_refused_by_name(text: str) -> None:
    world = served()
    annotate(world, retry_at=text)
    plan = world.plan()
    assert plan.accepted.reason == "InvalidSpec"
    assert plan.accepted.message.startswith(
        f"metadata.annotations[{names.ANNOTATION_RETRY_AT}]: must be a time such as"
    )
