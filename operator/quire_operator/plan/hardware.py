"""What one pod gets and where it runs: `spec.resources` or a profile of the settings, turned into `Hardware`.

Knows no cluster: whether a node has such hardware, the scheduler tells. What no API server would take, or no scheduler
could ever place (a GPU asked for in requests alone, two kinds of GPU, more requested than allowed), is refused here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

from quire_contract.units import UnitError, parse_quantity
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_operator.spec.settings import Profile, Settings

_GPU_SUFFIXES: Final = ("/gpu", "/gpu.shared")
_GPU_PREFIXES: Final = ("nvidia.com/mig-", "gpu.intel.com/")
_Quantities = Mapping[str, str]


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
    """Such as nvidia.com/gpu; None on a CPU."""
    gpu_memory_bytes: int | None = None
    """None: not known, or no GPU."""


def resolve_hardware(deployment: LLMDeployment, settings: Settings, profile: str | None) -> Hardware:
    """Return the hardware of one pod of a deployment, on `profile` or, where that is None, by `spec.resources`.

    Raises:
        SpecError: the profile is not known, or the resources cannot work. The message names the field and the cure.
    """
    if profile is None:
        given = deployment.spec.resources
        if given is None:
            raise SpecError("spec.resources", "is required where no profile is given")
        return _resolve(given.limits, given.requests, "spec.resources", settings, Profile(memory=settings.gpu_memory))
    path = _profile_path(deployment, profile)
    known = settings.profiles.get(profile)
    if known is None:
        names = ", ".join(sorted(settings.profiles)) or "none; an administrator adds them to the operator's settings"
        raise SpecError(path, f"{profile!r} is not a profile of this cluster; known are {names}")
    limits, requests = ({key: str(value) for key, value in part.items()} for part in _parts(known))
    return _resolve(limits, requests, path, settings, known)


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


def is_gpu(resource: str) -> bool:
    """Whether a resource's name is that of a GPU, or of a part of one that a container sees as one."""
    return resource.endswith(_GPU_SUFFIXES) or resource.startswith(_GPU_PREFIXES)


def _resolve(limits: _Quantities, requests: _Quantities, path: str, settings: Settings, profile: Profile) -> Hardware:
    gpus = _count_gpus(limits, requests, path)
    _check_requests(limits, requests, path)
    gpu_resource, num_gpus = next(iter(gpus.items()), (None, 0))
    images = settings.images
    return Hardware(
        limits=limits,
        requests=requests,
        node_selector=profile.node_selector,
        tolerations=profile.tolerations,
        runtime_class_name=profile.runtime_class_name or None,
        image=profile.image or (images.server_cuda if num_gpus else images.server_cpu),
        num_gpus=num_gpus,
        gpu_resource=gpu_resource,
        gpu_memory_bytes=_gpu_memory(profile.memory, path) if num_gpus else None,
    )


def _count_gpus(limits: _Quantities, requests: _Quantities, path: str) -> dict[str, int]:
    """Return the GPUs asked for: none, or one kind."""
    gpus = {}
    for resource in filter(is_gpu, dict.fromkeys((*limits, *requests))):
        if resource not in limits:
            raise SpecError(f"{path}.requests[{resource}]", "a GPU is never shared: give it in limits")
        count = _quantity(limits[resource], f"{path}.limits[{resource}]")
        if count.denominator != 1:
            raise SpecError(f"{path}.limits[{resource}]", f"must be a whole number of GPUs, not {limits[resource]}")
        if resource in requests and _quantity(requests[resource], f"{path}.requests[{resource}]") != count:
            raise SpecError(f"{path}.requests[{resource}]", "must equal the limit, or be left out")
        if count:
            gpus[resource] = int(count)
    if len(gpus) > 1:
        raise SpecError(f"{path}.limits", f"one kind of GPU can be used, not {' and '.join(sorted(gpus))}")
    return gpus


def _check_requests(limits: _Quantities, requests: _Quantities, path: str) -> None:
    for part, quantities in (("limits", limits), ("requests", requests)):
        for resource, text in quantities.items():
            if _quantity(text, f"{path}.{part}[{resource}]") < 0:
                raise SpecError(f"{path}.{part}[{resource}]", "must not be negative")
    for resource, text in requests.items():
        limit = limits.get(resource)
        if limit is not None and _quantity(text, path) > _quantity(limit, path):
            raise SpecError(
                f"{path}.requests[{resource}]",
                f"must be at most the limit ({text} > {limit}); raise limits or lower it",
            )


def _gpu_memory(text: str, path: str) -> int | None:
    return int(_quantity(text, f"{path}: memory of one GPU")) if text else None


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
