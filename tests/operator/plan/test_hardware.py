"""Resources and profiles, and those that cannot work."""

from typing import Any

import pytest

from quire_operator.plan.hardware import Hardware, pods_per_replica, resolve_hardware
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_operator.spec.settings import Settings, parse_settings

SETTINGS = parse_settings(
    {
        "images": {"serverCpu": "cpu", "serverCuda": "cuda"},
        "gpuMemory": "24Gi",
        "profiles": {
            "h100": {
                "resources": {"limits": {"nvidia.com/gpu": 2, "cpu": 8}, "requests": {"cpu": 4}},
                "memory": "80Gi",
                "nodeSelector": {"gpu": "h100"},
                "tolerations": [{"operator": "Exists"}],
                "runtimeClassName": "nvidia",
            },
            "arm": {"resources": {"limits": {"cpu": 4}}, "image": "arm"},
            "broken": {"resources": {"limits": {"cpu": "plenty"}}},
        },
    }
)


def deployment(spec: dict[str, Any]) -> LLMDeployment:
    return LLMDeployment.from_manifest({"metadata": {"name": "m"}, "spec": {"model": {"uri": "hf://a/b"}, **spec}})


def resolve(resources: dict[str, Any], settings: Settings = SETTINGS) -> Hardware:
    return resolve_hardware(deployment({"resources": resources}), settings, None)


def test_a_cpu_has_the_cpu_image_and_no_gpu() -> None:
    hardware = resolve({"limits": {"cpu": 2, "memory": "2Gi", "nvidia.com/gpu": 0}})
    assert (hardware.image, hardware.num_gpus, hardware.gpu_resource) == ("cpu", 0, None)
    assert hardware.gpu_memory_bytes is None
    assert hardware.limits == {"cpu": "2", "memory": "2Gi", "nvidia.com/gpu": "0"}


def test_a_whole_gpu_has_the_other_image_and_the_memory_of_the_settings() -> None:
    hardware = resolve({"limits": {"nvidia.com/gpu": 2}})
    assert (hardware.image, hardware.num_gpus, hardware.gpu_resource) == ("cuda", 2, "nvidia.com/gpu")
    assert hardware.gpu_memory_bytes == 24 << 30


def test_a_profile_brings_everything_along() -> None:
    hardware = resolve_hardware(deployment({"profiles": ["h100", "arm"]}), SETTINGS, "h100")
    assert hardware == Hardware(
        limits={"nvidia.com/gpu": "2", "cpu": "8"},
        requests={"cpu": "4"},
        node_selector={"gpu": "h100"},
        tolerations=({"operator": "Exists"},),
        runtime_class_name="nvidia",
        image="cuda",
        num_gpus=2,
        gpu_resource="nvidia.com/gpu",
        gpu_memory_bytes=80 << 30,
    )
    assert resolve_hardware(deployment({"profiles": ["h100", "arm"]}), SETTINGS, "arm").image == "arm"


@pytest.mark.parametrize(
    ("resources", "path", "message"),
    [
        ({"requests": {"nvidia.com/gpu": 1}}, "spec.resources.requests[nvidia.com/gpu]", "limits"),
        ({"limits": {"nvidia.com/gpu": "500m"}}, "spec.resources.limits[nvidia.com/gpu]", "whole number"),
        (
            {"limits": {"nvidia.com/gpu": 2}, "requests": {"nvidia.com/gpu": 1}},
            "spec.resources.requests[nvidia.com/gpu]",
            "must equal",
        ),
        (
            {"limits": {"nvidia.com/gpu": 1, "nvidia.com/mig-1g.10gb": 1}},
            "spec.resources.limits[nvidia.com/mig-1g.10gb]",
            "one kind",
        ),
        ({"limits": {"memmory": "1Gi"}}, "spec.resources.limits[memmory]", "is memory meant"),
        (
            {"limits": {"memory": "1Gi"}, "requests": {"memory": "1.5Gi"}},
            "spec.resources.requests[memory]",
            "1.5Gi > 1",
        ),
    ],
)
def test_resources_that_cannot_work_are_refused(resources: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        resolve(resources)
    assert caught.value.path == path


def test_an_unknown_profile_is_answered_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="known are arm, broken, h100") as caught:
        resolve_hardware(deployment({"profile": "h200"}), SETTINGS, "h200")
    assert caught.value.path == "spec.profile"
    with pytest.raises(SpecError, match="known are none") as caught:
        resolve_hardware(deployment({"profiles": ["arm", "h200"]}), Settings(), "h200")
    assert caught.value.path == "spec.profiles[1]"


def test_a_profile_with_an_unreadable_quantity_is_named() -> None:
    with pytest.raises(SpecError, match="plenty") as caught:
        resolve_hardware(deployment({"profile": "broken"}), SETTINGS, "broken")
    assert caught.value.path == "spec.profile.limits[cpu]"


@pytest.mark.parametrize(
    ("tensor", "pipeline", "limits", "num_pods"),
    [
        (1, 1, {"cpu": 2}, 1),
        (2, 1, {"cpu": 2}, 1),
        (1, 2, {"cpu": 2}, 2),
        (4, 1, {"nvidia.com/gpu": 4}, 1),
        (2, 2, {"nvidia.com/gpu": 4}, 1),
        (1, 1, {"nvidia.com/gpu": 4}, 1),
        (8, 2, {"nvidia.com/gpu": 8}, 2),
        (16, 1, {"nvidia.com/gpu": 8}, 2),
        (1, 3, {"nvidia.com/gpu": 1}, 3),
    ],
)
def test_pods_of_a_replica(tensor: int, pipeline: int, limits: dict[str, Any], num_pods: int) -> None:
    engine = {"tensorParallelSize": tensor, "pipelineParallelSize": pipeline}
    wanted = deployment({"resources": {"limits": limits}, "engine": engine})
    assert pods_per_replica(wanted, resolve_hardware(wanted, SETTINGS, None)) == num_pods


def test_devices_that_cannot_be_dealt_out_are_refused() -> None:
    wanted = deployment({"resources": {"limits": {"nvidia.com/gpu": 4}}, "engine": {"tensorParallelSize": 6}})
    with pytest.raises(SpecError, match="multiple of the GPUs") as caught:
        pods_per_replica(wanted, resolve_hardware(wanted, SETTINGS, None))
    assert caught.value.path == "spec.engine.tensorParallelSize"
