"""Which of a pod's resources are devices of the server: by the table of the settings, and refused where it knows none.

A resource that the server cannot use would be held by pods that compute on something else, or get an image that cannot
use it; so a name that is not known is refused, with the known ones. Knows no cluster.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

from quire_operator.spec.llm_deployment import SpecError
from quire_operator.spec.settings import Accelerator, Settings

_NATIVE: Final = ("cpu", "memory", "ephemeral-storage")
_HUGE_PAGES: Final = "hugepages-"
_TYPING_ERROR: Final = 0.9
"""So alike are nvidia.com/gpus and nvidia.com/gpu; amd.com/gpu and nvidia.com/gpu are not."""


def find_devices(paths: Mapping[str, str], settings: Settings, *, own_image: str) -> dict[str, Accelerator]:
    """Return the resources that are devices, and what they are.

    Args:
        paths: where each resource is asked for, by its name.
        own_image: an image that was named for these resources, which may use what is not known here; or empty.

    Raises:
        SpecError: a resource is not known.
    """
    devices = {}
    for resource, path in paths.items():
        if not _is_extended(resource):
            _check_native(resource, path)
            continue
        accelerator = settings.find_accelerator(resource)
        if accelerator is None and own_image:
            accelerator = Accelerator(device="other", image=own_image)
        if accelerator is None:
            raise SpecError(path, _unknown(resource, settings))
        if accelerator.device != "none":
            devices[resource] = accelerator
    return devices


def _is_extended(resource: str) -> bool:
    """Whether a resource is none of Kubernetes' own, as Kubernetes tells them apart."""
    return "/" in resource and "kubernetes.io/" not in resource


def _check_native(resource: str, path: str) -> None:
    if resource in _NATIVE or resource.startswith(_HUGE_PAGES) or "/" in resource:
        return
    raise SpecError(path, f"is no resource of a container{_meant(resource, _NATIVE)}")


def _unknown(resource: str, settings: Settings) -> str:
    known = sorted(settings.known_accelerators)
    meant = _meant(resource, known, _TYPING_ERROR)
    return (
        f"{resource} is no accelerator that the server is known to use{meant}; known are {', '.join(known)}; an"
        " administrator adds others to `accelerators` of the operator's settings, or offers them in a profile with an"
        " image of its own; spec.image names one for this model alone"
    )


def _meant(resource: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(resource, list(known), n=1, cutoff=cutoff)
    return f"; is {close[0]} meant?" if close else ""
