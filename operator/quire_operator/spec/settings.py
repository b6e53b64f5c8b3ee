"""The operator's own settings: one YAML file, which a chart renders and an administrator may edit.

`load_settings` reads it whole and refuses what it does not know, naming the field. Profiles are what administrators
promise to users by name: hardware, where it is, and the image that runs on it. Knows no cluster.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """Empty: chosen by whether the resources name a GPU."""
    fallback_after: str = "5m"
    """How long pods of this profile may be unschedulable before the next profile of the list is tried."""


class DownloadSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    hub_endpoint: str = ""
    """A mirror of the Hugging Face hub. Empty: the hub."""
    env_from_secret: str = ""
    """A Secret, in the LLMDeployment's namespace, with further variables: AWS_ACCESS_KEY_ID and the like."""
    resources: ProfileResources = ProfileResources(
        limits={"memory": "2Gi"}, requests={"cpu": "100m", "memory": "256Mi"}
    )


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
    gpu_memory: str = ""
    """Memory of one GPU where resources are given without a profile. Empty: unknown, and fit is not judged."""


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
