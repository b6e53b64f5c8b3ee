"""What one pod gets and where it runs: `spec.resources` or a profile of the settings, turned into `Hardware`.

What `spec.podTemplate` says of the server's container wins, as it does in the pod. Knows no cluster: whether a node has
such hardware, the scheduler tells. What no API server would take, or no scheduler could ever place (a GPU asked for in
requests alone, two kinds of GPU, more requested than allowed), is refused here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

from quire_contract import names
from quire_contract.units import UnitError, parse_quantity
from quire_operator.plan.accelerators import find_devices
from quire_operator.plan.resources.workload.merge import merge_strategically
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_operator.spec.settings import NVIDIA_GPU, Profile, Settings

CONTAINER: Final = names.COMPONENT_SERVER
"""Name of the container that serves."""
_TEMPLATE: Final = "spec.podTemplate.spec"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What one pod gets and where it runs: from `spec.resources`, or from the active profile."""

    limits: Mapping[str, str]
    requests: Mapping[str, str]
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    runtime_class_name: str | None = None
    image: str
    num_gpus: int
    gpu_resource: str | None = None
    """Such as nvidia.com/gpu, or a part of one that a container sees as one; None on a CPU."""
    gpu_memory_bytes: int | None = None
    """None: not known, or no GPU."""
    memory_field: str = "resources.limits.memory"
    """Where the memory of a pod is said, for whoever should say more."""


def resolve_hardware(deployment: LLMDeployment, settings: Settings, profile: str | None) -> Hardware:
    """Return the hardware of one pod of a deployment, on `profile` or, where that is None, by `spec.resources`.

    Raises:
        SpecError: the profile is not known, or the resources cannot work. The message names the field and the cure.
    """
    if profile is None:
        given = deployment.spec.resources
        if given is None:
            raise SpecError("spec.resources", "is required where no profile is given")
        asked = _merge_template(deployment, given.limits, given.requests, "spec.resources")
        return _resolve(asked, settings, Profile(), whole_gpu_memory=settings.gpu_memory)
    path = _profile_path(deployment, profile)
    known = settings.profiles.get(profile)
    if known is None:
        offered = ", ".join(sorted(settings.profiles)) or "none; an administrator adds them to the operator's settings"
        raise SpecError(path, f"{profile!r} is not a profile of this cluster; known are {offered}")
    limits, requests = ({key: str(value) for key, value in part.items()} for part in _parts(known))
    return _resolve(_merge_template(deployment, limits, requests, path), settings, known)


def pods_per_replica(deployment: LLMDeployment, hardware: Hardware) -> int:
    """Return how many pods one replica spans; more than one needs a LeaderWorkerSet.

    A replica fills its pods' GPUs. On CPUs a pod is one stage of the pipeline.

    Raises:
        SpecError: the devices cannot be dealt out evenly.
    """
    engine, num_gpus = deployment.spec.engine, hardware.num_gpus
    num_devices = engine.tensor_parallel_size * engine.pipeline_parallel_size
    if num_gpus == 0:
        return engine.pipeline_parallel_size
    if num_devices <= num_gpus:
        return 1
    if num_devices % num_gpus:
        sizes = f"{engine.tensor_parallel_size} × {engine.pipeline_parallel_size}"
        raise SpecError(
            "spec.engine.tensorParallelSize",
            f"{sizes} (tensorParallelSize × pipelineParallelSize) devices cannot be dealt out to pods of {num_gpus}"
            " GPUs; make the product a multiple of the GPUs of one pod",
        )
    return num_devices // num_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a pod's container asks for in the end."""

    limits: Mapping[str, str]
    requests: Mapping[str, str]
    image: str
    """Empty: said neither by the spec nor by the template."""
    path: str
    """Of what the template leaves as it is."""
    from_template: frozenset[tuple[str, str]]
    """Which of the quantities the template says: (limits or requests, resource)."""

    def path_of(self, part: str, resource: str) -> str:
        where = self.path
        if (part, resource) in self.from_template:
            where = f"{_TEMPLATE}.containers[{CONTAINER}].resources"
        return f"{where}.{part}[{resource}]"

    @property
    def memory_field(self) -> str:
        in_template = ("limits", "memory") in self.from_template
        return self.path_of("limits", "memory") if in_template else "resources.limits.memory"

    def quantity(self, part: str, resource: str) -> Fraction:
        return _quantity(getattr(self, part)[resource], self.path_of(part, resource))


def _merge_template(
    deployment: LLMDeployment, limits: Mapping[str, str], requests: Mapping[str, str], path: str
) -> _Asked:
    """Merge in what `spec.podTemplate` says of the container, as it is merged into the pod."""
    before: dict[str, Any] = {"limits": dict(limits), "requests": dict(requests)}
    image = deployment.spec.children.image or ""
    container: dict[str, Any] = {"name": CONTAINER, "image": image, "resources": before}
    template = deployment.spec.pod_template.get("spec")
    patch = {"containers": template["containers"]} if isinstance(template, dict) and "containers" in template else {}
    merged = merge_strategically({"containers": [container]}, patch, _TEMPLATE)
    found = next((item for item in merged.get("containers") or () if item.get("name") == CONTAINER), container)
    after = {part: (found.get("resources") or {}).get(part) or {} for part in before}
    for part, quantities in after.items():
        if not isinstance(quantities, dict):
            raise SpecError(f"{_TEMPLATE}.containers[{CONTAINER}].resources.{part}", "must be a mapping")
    said = {(part, name) for part, there in after.items() for name in there if there[name] != before[part].get(name)}
    texts = {part: {name: str(value) for name, value in there.items()} for part, there in after.items()}
    return _Asked(**texts, image=str(found.get("image") or ""), path=path, from_template=frozenset(said))


def _resolve(asked: _Asked, settings: Settings, profile: Profile, whole_gpu_memory: str = "") -> Hardware:
    own_image = asked.image or profile.image
    paths = {name: asked.path_of(part, name) for part in ("requests", "limits") for name in getattr(asked, part)}
    devices = find_devices(paths, settings, own_image=own_image)
    counts = _count_devices(asked, devices)
    _check_requests(asked)
    gpu_resource, num_gpus = next(iter(counts.items()), (None, 0))
    image, memory = settings.images.server_cpu, ""
    if gpu_resource is not None:
        accelerator = devices[gpu_resource]
        image = accelerator.image or settings.images.server_cuda
        memory = profile.memory or accelerator.memory or (whole_gpu_memory if gpu_resource == NVIDIA_GPU else "")
    return Hardware(
        limits=asked.limits,
        requests=asked.requests,
        node_selector=profile.node_selector,
        tolerations=profile.tolerations,
        runtime_class_name=profile.runtime_class_name or None,
        image=profile.image or image,
        num_gpus=num_gpus,
        gpu_resource=gpu_resource,
        memory_field=asked.memory_field,
        gpu_memory_bytes=int(_quantity(memory, f"{asked.path}: memory of one {gpu_resource}")) if memory else None,
    )


def _count_devices(asked: _Asked, devices: Iterable[str]) -> dict[str, int]:
    """Return the devices asked for: none, or one kind."""
    counts = {}
    for resource in devices:
        if resource not in asked.limits:
            raise SpecError(asked.path_of("requests", resource), "a GPU is never shared: give it in limits")
        count, text = asked.quantity("limits", resource), asked.limits[resource]
        if count.denominator != 1:
            raise SpecError(asked.path_of("limits", resource), f"must be a whole number of GPUs, not {text}")
        if resource in asked.requests and asked.quantity("requests", resource) != count:
            raise SpecError(asked.path_of("requests", resource), "must equal the limit, or be left out")
        if count:
            counts[resource] = int(count)
    if len(counts) > 1:
        first, second = sorted(counts)[:2]
        message = f"one kind of GPU can be used, not {first} and {second}"
        raise SpecError(asked.path_of("limits", second), message)
    return counts


def _check_requests(asked: _Asked) -> None:
    for part in ("limits", "requests"):
        for resource in getattr(asked, part):
            if asked.quantity(part, resource) < 0:
                raise SpecError(asked.path_of(part, resource), "must not be negative")
    for resource, text in asked.requests.items():
        limit = asked.limits.get(resource)
        if limit is not None and asked.quantity("requests", resource) > asked.quantity("limits", resource):
            raise SpecError(
                asked.path_of("requests", resource),
                f"must be at most the limit ({text} > {limit}); raise limits or lower it",
            )


def _quantity(text: str, path: str) -> Fraction:
    try:
        return parse_quantity(text)
    except UnitError as error:
        raise SpecError(path, str(error)) from None


def _parts(profile: Profile) -> tuple[Mapping[str, str | int | float], Mapping[str, str | int | float]]:
    return profile.resources.limits, profile.resources.requests


def _profile_path(deployment: LLMDeployment, profile: str) -> str:
    profiles = deployment.spec.profiles
    return f"spec.profiles[{profiles.index(profile)}]" if len(profiles) > 1 else "spec.profile"
