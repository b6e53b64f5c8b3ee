"""Which resources the server can use, with which image and how much memory; and that a podTemplate's count alike.

What is an extended resource is Kubernetes' word (pkg/apis/core/v1/helper, IsExtendedResourceName).
"""

from typing import Any

import pytest
from plan_world import FACTS, GIB, World, manifest, served

from quire_operator.plan.fit import judge_fit, read_engine_settings
from quire_operator.plan.hardware import Hardware, resolve_hardware
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_operator.spec.settings import Settings, SettingsError, parse_settings

SETTINGS: dict[str, Any] = {
    "images": {"serverCpu": "cpu", "serverCuda": "cuda"},
    "gpuMemory": "80Gi",
    "accelerators": {
        "nvidia.com/mig-1g.10gb": {"memory": "9.5Gi"},
        "amd.com/gpu": {"device": "other", "image": "rocm", "memory": "192Gi"},
        "rdma/*": {"device": "none"},
    },
    "profiles": {"tpu": {"resources": {"limits": {"google.com/tpu": 4}}, "image": "tpu", "memory": "16Gi"}},
}


SERVER = "spec.podTemplate.spec.containers[server].resources"


def deployment(resources: dict[str, Any] | None, server: dict[str, Any] | None = None) -> LLMDeployment:
    spec: dict[str, Any] = {"resources": resources, "podTemplate": template(server)}
    return LLMDeployment.from_manifest(manifest({**spec, **({"profile": "tpu"} if resources is None else {})}))


def template(server: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if server is None else {"spec": {"containers": [{"name": "server", **server}]}}


def resolve(resources: dict[str, Any], server: dict[str, Any] | None = None, **settings: Any) -> Hardware:
    return resolve_hardware(deployment(resources, server), parse_settings({**SETTINGS, **settings}), None)


@pytest.mark.parametrize(
    ("resource", "image", "gib"),
    [
        ("nvidia.com/gpu", "cuda", 80),
        ("nvidia.com/gpu.shared", "cuda", None),
        ("nvidia.com/mig-1g.10gb", "cuda", 9.5),
        ("nvidia.com/mig-3g.40gb", "cuda", None),
        ("amd.com/gpu", "rocm", 192),
    ],
)
def test_a_known_accelerator_has_its_image_and_its_own_memory(resource: str, image: str, gib: float | None) -> None:
    """A slice or a share of a GPU is not said to have the memory of the whole."""
    hardware = resolve({"limits": {resource: 2}})
    assert (hardware.image, hardware.gpu_resource, hardware.num_gpus) == (image, resource, 2)
    assert hardware.gpu_memory_bytes == (None if gib is None else int(gib * GIB))


def test_the_memory_of_a_slice_that_nobody_told_is_asked_for_by_its_name() -> None:
    wanted = deployment({"limits": {"nvidia.com/mig-3g.40gb": 1}})
    hardware = resolve_hardware(wanted, parse_settings(SETTINGS), None)
    fit = judge_fit(read_engine_settings(wanted), hardware, FACTS)
    assert (fit.verdict.holds, fit.verdict.reason) == (None, "MemoryUnknown")
    assert "accelerators[nvidia.com/mig-3g.40gb].memory" in fit.verdict.message
    assert "gpuMemory" not in fit.verdict.message


@pytest.mark.parametrize("part", ["limits", "requests"])
@pytest.mark.parametrize(
    "resource",
    [
        *("nvidia.com/gpus", "google.com/tpu", "habana.ai/gaudi", "aws.amazon.com/neuron", "gpu.intel.com/i915"),
        *("nvidia/gpu", "example.com/foo", "amd.com/gpus"),
    ],
)
def test_what_the_server_is_not_known_to_use_is_refused_with_what_is(resource: str, part: str) -> None:
    plan = World(manifest=manifest({"resources": {part: {resource: 1}}}), settings=parse_settings(SETTINGS)).plan()
    assert (plan.accepted.holds, plan.accepted.reason, plan.actions) == (False, "InvalidResources", ())
    assert plan.accepted.message.startswith(f"spec.resources.{part}[{resource}]: {resource} is no accelerator")
    known = "known are amd.com/gpu, nvidia.com/gpu, nvidia.com/gpu.shared, nvidia.com/mig-*, nvidia.com/mig-1g.10gb"
    assert known in plan.accepted.message
    assert ("is nvidia.com/gpu meant?" in plan.accepted.message) == (resource == "nvidia.com/gpus")


def test_a_card_that_is_no_device_goes_along() -> None:
    hardware = resolve({"limits": {"nvidia.com/gpu": 1, "rdma/hca": 1}})
    assert (hardware.gpu_resource, hardware.num_gpus) == ("nvidia.com/gpu", 1)
    assert hardware.limits["rdma/hca"] == "1"
    assert resolve({"limits": {"rdma/hca": 1}}).image == "cpu"


@pytest.mark.parametrize("resource", ["cpu", "memory", "ephemeral-storage", "hugepages-2Mi", "x.kubernetes.io/foo"])
def test_what_is_kubernetes_own_is_no_accelerator(resource: str) -> None:
    assert resolve({"limits": {resource: 1}}).num_gpus == 0


def test_a_profile_with_an_image_of_its_own_may_use_anything() -> None:
    hardware = resolve_hardware(deployment(None), parse_settings(SETTINGS), "tpu")
    assert (hardware.image, hardware.num_gpus, hardware.gpu_resource) == ("tpu", 4, "google.com/tpu")
    assert hardware.gpu_memory_bytes == 16 * GIB


def test_so_may_a_template_with_an_image_of_its_own() -> None:
    server = {"image": "mine", "resources": {"limits": {"habana.ai/gaudi": "1"}}}
    assert resolve({"limits": {"memory": "8Gi"}}, server).gpu_resource == "habana.ai/gaudi"


def test_so_may_a_spec_with_an_image_of_its_own() -> None:
    spec = {"resources": {"limits": {"habana.ai/gaudi": "1"}}, "image": "mine"}
    hardware = resolve_hardware(LLMDeployment.from_manifest(manifest(spec)), parse_settings(SETTINGS), None)
    assert (hardware.gpu_resource, hardware.num_gpus) == ("habana.ai/gaudi", 1)


def test_settings_say_which_image_uses_another_device() -> None:
    with pytest.raises(SettingsError, match=r"needs an image .* `\$\.accelerators"):
        parse_settings({"accelerators": {"amd.com/gpu": {"device": "other"}}})
    assert Settings().find_accelerator("amd.com/gpu") is None


@pytest.mark.parametrize(("inside", "fits"), [("64Gi", True), ("1Gi", False)])
def test_the_memory_of_a_template_counts_because_it_is_the_pods(inside: str, fits: bool) -> None:
    outside = {"1Gi": "64Gi", "64Gi": "1Gi"}[inside]
    resources = {"limits": {"cpu": "4", "memory": outside}}
    world = World(manifest=manifest({"resources": resources}))
    world.set_spec(podTemplate=template({"resources": {"limits": {"memory": inside}}}))
    world.step()
    world.download()
    made = world.plan()
    assert made.fits is not None
    assert made.fits.holds is fits, made.fits
    if not fits:
        assert "has 922 MiB" in made.fits.message
        assert made.fits.message.endswith(f"raise {SERVER}.limits[memory]")


def test_resources_of_a_template_decide_over_image_and_threads() -> None:
    settings = parse_settings(SETTINGS)
    gpu = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    container = served({"podTemplate": template(gpu)}, settings=settings).workload()["spec"]["template"]["spec"]
    assert container["containers"][0]["image"] == "cuda"
    fewer = served({"podTemplate": template({"resources": {"limits": {"cpu": "2"}}})})
    env = fewer.workload()["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "OMP_NUM_THREADS", "value": "2"} in env


@pytest.mark.parametrize(
    ("server", "path"),
    [
        ({"limits": {"nvidia.com/gpus": 1}}, f"{SERVER}.limits[nvidia.com/gpus]"),
        ({"requests": {"memory": "9Gi"}}, f"{SERVER}.requests[memory]"),
        ({"limits": {"memory": "lots"}}, f"{SERVER}.limits[memory]"),
        ({"limits": "lots"}, "spec.podTemplate.spec.containers[0].resources.limits"),
        ({"limits": None, "requests": {"nvidia.com/gpu": 1}}, f"{SERVER}.requests[nvidia.com/gpu]"),
    ],
)
def test_what_is_wrong_in_a_template_is_named_there(server: dict[str, Any], path: str) -> None:
    resources = {"limits": {"memory": "8Gi"}}
    with pytest.raises(SpecError) as caught:
        resolve(resources, {"resources": server})
    assert caught.value.path == path
    spec = {"resources": resources, "podTemplate": template({"resources": server})}
    plan = World(manifest=manifest(spec)).plan()
    assert (plan.accepted.holds, plan.accepted.reason) == (False, "InvalidPodTemplate")
