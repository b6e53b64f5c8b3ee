"""Where the download runs: with the pods that will serve, because a volume may be made where its first pod is."""

from typing import Any

import pytest
from plan_world import JOB_NAME, World, attempt, condition, described, downloading

from quire_kube.times import format_time
from quire_operator.spec.settings import parse_settings

PROFILES = {
    "a": {
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "nodeSelector": {"pool": "a"},
        "tolerations": [{"key": "team", "operator": "Exists"}],
        "runtimeClassName": "nvidia",
        "fallbackAfter": "2m",
    },
    "b": {"resources": {"limits": {"memory": "8Gi"}}, "nodeSelector": {"pool": "b"}},
}


def profiled(*profiles: str) -> World:
    spec = {"resources": None, "profiles": list(profiles)}
    return downloading(spec, settings=parse_settings({"profiles": PROFILES}))


def job_spec(world: World) -> dict[str, Any]:
    assert world.observed.job is not None
    spec: dict[str, Any] = world.observed.job["spec"]["template"]["spec"]
    return spec


def unschedulable(world: World, message: str = "0/3 nodes are available") -> None:
    pod = world.add_job_pod("Pending")
    said = condition("PodScheduled", "False", at=world.now, reason="Unschedulable", message=message)
    pod["status"] |= {"conditions": [said], "containerStatuses": []}


def test_a_download_runs_where_the_model_will() -> None:
    spec = job_spec(profiled("a", "b"))
    assert spec["nodeSelector"] == {"pool": "a"}
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert spec["tolerations"] == [{"key": "team", "operator": "Exists"}, gpu]
    assert "runtimeClassName" not in spec
    assert "nvidia.com/gpu" not in repr(spec["containers"])
    anywhere = job_spec(downloading())
    assert not {"nodeSelector", "tolerations"} & set(anywhere)


def test_a_download_runs_where_the_pod_template_says() -> None:
    nodes = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": []}]}}
    template = {
        "nodeSelector": {"zone": "z"},
        "tolerations": [{"key": "own", "operator": "Exists"}],
        "affinity": {"nodeAffinity": nodes},
        "priorityClassName": "high",
        "containers": [{"name": "side-car", "image": "x"}],
    }
    spec = {"resources": None, "profiles": ["b"], "podTemplate": {"spec": template}}
    placed = job_spec(downloading(spec, settings=parse_settings({"profiles": PROFILES})))
    assert placed["nodeSelector"] == {"pool": "b", "zone": "z"}
    assert placed["tolerations"] == [{"key": "own", "operator": "Exists"}]
    assert placed["affinity"]["nodeAffinity"] == nodes
    assert "podAffinity" in placed["affinity"]
    assert "priorityClassName" not in placed
    assert len(placed["containers"]) == 1


def test_a_download_does_not_wait_for_other_pods() -> None:
    """The model's own pods cannot be there before it, and may be where no other may go."""
    terms = {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "zone"}]}
    affinity = {"podAffinity": terms, "podAntiAffinity": terms}
    placed = job_spec(downloading({"podTemplate": {"spec": {"affinity": affinity}}}))
    assert list(placed["affinity"]) == ["podAffinity"]
    assert placed["affinity"] == job_spec(downloading())["affinity"]
    for none in (None, {"podAffinity": None}):
        assert job_spec(downloading({"podTemplate": {"spec": {"affinity": none}}}))["affinity"] == placed["affinity"]


@pytest.mark.parametrize("spec", [{"affinity": {"nodeAffinity": {"x": []}}}, {"nodeSelector": {"pool": "gpu"}}, {}])
def test_a_download_may_run_on_a_node_that_is_kept_for_gpus(spec: dict[str, Any]) -> None:
    gpus = {"resources": {"limits": {"nvidia.com/gpu": 1}}, "podTemplate": {"spec": spec}}
    tolerated = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert job_spec(downloading(gpus))["tolerations"] == tolerated
    shared = {**gpus, "cache": {"accessMode": "ReadWriteMany"}}
    assert job_spec(downloading(shared)).get("tolerations") == (tolerated if spec else None)


def test_what_the_api_server_drops_from_a_placement_makes_no_other_download() -> None:
    world = downloading(
        {"podTemplate": {"spec": {"tolerations": [{"key": "own", "operator": "Exists", "effect": ""}]}}}
    )
    del job_spec(world)["tolerations"][0]["effect"]
    unschedulable(world)
    assert world.plan().actions == ()


def test_a_download_is_beside_the_pods_that_have_the_volume() -> None:
    """A volume of one node that is attached elsewhere would keep its pod waiting without a word."""
    world = downloading()
    assert world.observed.job is not None
    (term,) = job_spec(world)["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    labels = world.observed.job["spec"]["template"]["metadata"]["labels"]
    assert term["labelSelector"]["matchLabels"].items() <= labels.items(), "the first pod may go anywhere"
    assert "affinity" not in job_spec(downloading({"cache": {"accessMode": "ReadWriteMany"}}))


def test_a_download_that_has_its_node_is_not_begun_anew_elsewhere() -> None:
    world = profiled("a")
    world.set_spec(profiles=["b"])
    assert world.plan().actions == ()
    world.add_job_pod("Running")
    assert world.plan().actions == ()


def test_a_download_that_finds_no_node_moves_to_where_the_model_is_wanted() -> None:
    world = profiled("a")
    unschedulable(world)
    assert world.plan().actions == ()
    world.set_spec(profiles=["b"])
    assert described(world.plan().actions) == [f"Delete Job/{JOB_NAME}"]
    world.settle()
    assert job_spec(world)["nodeSelector"] == {"pool": "b"}


def test_two_users_who_place_a_download_differently_do_not_take_turns_fast() -> None:
    world = profiled("a")
    world.see(other_cache_users=frozenset({"other"}))
    world.set_spec(profiles=["b"])
    unschedulable(world)
    assert (world.plan().actions, world.plan().requeue_after_s) == ((), 15)
    world.now += 15
    world.settle()
    assert (job_spec(world)["nodeSelector"], attempt(world)) == ({"pool": "b"}, "2")
    world.set_spec(profiles=["a"])
    unschedulable(world)
    assert (world.plan().actions, world.plan().requeue_after_s) == ((), 30)


def test_a_download_that_finds_no_node_for_too_long_tries_the_next_profile() -> None:
    world = profiled("a", "b")
    world.set_status(activeProfile={"name": "a", "since": format_time(world.now)})
    unschedulable(world)
    assert (world.plan().profile, world.plan().requeue_after_s) == ("a", 120)
    world.now += 120
    assert world.step().profile == "b"
    world.set_status(activeProfile={"name": "b", "since": format_time(world.now)})
    world.settle()
    assert job_spec(world)["nodeSelector"] == {"pool": "b"}


def test_a_download_that_waits_for_its_volume_stays_with_its_profile() -> None:
    world = profiled("a", "b")
    world.set_status(activeProfile={"name": "a", "since": format_time(world.now)})
    unschedulable(world, "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims.")
    world.now += 1000
    assert (world.plan().profile, world.plan().actions) == ("a", ())
