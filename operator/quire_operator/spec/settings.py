"""The operator's own settings: one YAML file, which a chart renders and an administrator may edit.

`load_settings` reads it whole and refuses what it does not know, naming the field. Profiles are what administrators
promise to users by name: hardware, where it is, and the image that runs on it. Knows no cluster.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import yaml

from quire_contract.nesting import bounded_nesting, check_depth


class SettingsError(ValueError):
    """The file cannot be read, or a field of it holds no usable value. The message names the field."""


class Images(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    server_cpu: str = "quire/server-cpu:latest"
    server_cuda: str = "quire/server-cuda:latest"
    """For pods that ask for a GPU."""
    download: str = ""
    """For download Jobs. Empty: `server_cpu`."""
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()


class ProfileResources(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    limits: dict[str, str | int | float] = {}
    requests: dict[str, str | int | float] = {}


class Accelerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a resource that pods may ask for is to the server."""

    device: Literal["cuda", "other", "none"] = "cuda"
    """cuda: a device for `images.serverCuda`. other: one for `image`. none: no device, such as a network card."""
    image: str = ""
    """Empty: `images.serverCuda`."""
    memory: str = ""
    """Memory of one, such as 10Gi. Empty: that of the profile, or `gpuMemory` for a whole GPU; else not known."""

    def __post_init__(self) -> None:
        if self.device == "other" and not self.image:
            raise ValueError("device: other needs an image that can use it")


NVIDIA_GPU: Final = "nvidia.com/gpu"
"""A whole GPU, which `gpuMemory` speaks of."""
ACCELERATORS: Final = {
    name: Accelerator() for name in (NVIDIA_GPU, "nvidia.com/gpu.shared", "nvidia.com/mig-*")
}  # fmt: skip
"""What is known without being told."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Hardware that an administrator offers under a name."""

    description: str = ""
    resources: ProfileResources = ProfileResources()
    memory: str = ""
    """Memory of one of the profile's GPUs, such as 80Gi: with it, whether a model fits is known before a pod runs."""
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] = ()
    runtime_class_name: str = ""
    image: str = ""
    """Empty: chosen by the accelerator. An image that is named here may use an accelerator that is not known."""
    fallback_after: str = "5m"
    """How long pods of this profile may be unschedulable before the next profile of the list is tried."""


class DownloadSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """What download pods get where `spec.download` says nothing else; fields are as there, and as in a pod."""

    hub_endpoint: str = ""
    """A mirror of the Hugging Face hub. Empty: the hub."""
    env: tuple[dict[str, Any], ...] = ()
    env_from: tuple[dict[str, Any], ...] = ()
    """Secrets and ConfigMaps in the LLMDeployment's namespace, with AWS_ACCESS_KEY_ID and the like."""
    resources: ProfileResources = ProfileResources(
        limits={"cpu": "2", "memory": "2Gi"}, requests={"cpu": "100m", "memory": "256Mi"}
    )
    """With both limits: a quota on limits refuses a pod that lacks one, and only an administrator could cure that."""
    ca_bundle: dict[str, dict[str, Any]] = {}
    """`configMapKeyRef` or `secretKeyRef`, in the LLMDeployment's namespace. Empty: the image's authorities."""
    service_account_name: str = ""
    """In the LLMDeployment's namespace. Empty: that namespace's default."""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    security_context: dict[str, Any] = {}


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Everything that the operator can be told."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to work in. Empty: all."""
    images: Images = Images()
    profiles: dict[str, Profile] = {}
    download: DownloadSettings = DownloadSettings()
    priority_class_name: str = ""
    routes_through_gateway: bool = False
    """Whether Services lead to the gateway; only then is there a demand to scale by."""
    image_volumes: bool | None = None
    """Whether the cluster mounts images as volumes. None: by its version."""
    openshift: bool | None = None
    """Whether the platform assigns every pod its user. None: where the cluster has OpenShift's API."""
    gpu_memory: str = ""
    """Memory of one whole GPU (nvidia.com/gpu) where resources are given without a profile. Empty: unknown."""
    accelerators: dict[str, Accelerator] = {}
    """By the resource's name, or by the beginning of names, with a * behind it. Added to `ACCELERATORS`."""

    @property
    def known_accelerators(self) -> dict[str, Accelerator]:
        return {**ACCELERATORS, **self.accelerators}

    def find_accelerator(self, resource: str) -> Accelerator | None:
        """Return what a resource is: by its name, else by the longest beginning of it that is known."""
        known = self.known_accelerators
        if resource in known:
            return known[resource]
        beginnings = [name for name in known if name.endswith("*") and resource.startswith(name[:-1])]
        return known[max(beginnings, key=len)] if beginnings else None


def load_settings(path: Path) -> Settings:
    """Read the settings.

    Raises:
        SettingsError: the file is missing or not YAML, or a field is unknown or of the wrong type.
    """
    try:
        with bounded_nesting():
            loaded = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from error
    return parse_settings(loaded or {}, str(path))


def parse_settings(loaded: Mapping[str, Any], where: str = "settings") -> Settings:
    """Check what a file holds. Quantities and durations are read where they are used first.

    Raises:
        SettingsError: as above.
    """
    try:
        check_depth(loaded)
        return msgspec.convert(loaded, Settings)
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from error
