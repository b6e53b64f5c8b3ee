"""What a download's pods get besides their work: the administrator's defaults, and over them what the model says.

Knows neither Jobs nor which model it is. Variables, labels, annotations and fields of the security context go by their
names; sources of variables add up, the model's last, which is where a later one wins; resources, the authorities and
the ServiceAccount are one's or the other's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quire_kube.objects import Manifest
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import Settings

CA_VOLUME: Final = "ca"
CA_FOLDER: Final = "/etc/quire/ca"
_CA_FILE: Final = "ca.crt"
CA_VARIABLES: Final = ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
"""By which a client of HTTP, of S3 and of Google's tokens each learn whom to trust."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadOptions:
    """All in the form that a pod has it."""

    env: Mapping[str, Manifest]
    """By name, in the order in which a value may refer to an earlier one."""
    env_from: tuple[Manifest, ...]
    resources: Manifest
    ca_volume: Manifest | None
    service_account_name: str | None
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    pull_secrets: tuple[str, ...]
    security_context: Mapping[str, Any]


def download_options(deployment: LLMDeployment, settings: Settings) -> DownloadOptions:
    """Return what the pods of a deployment's download get."""
    given, defaults, children = deployment.spec.download, settings.download, deployment.spec.children
    ca_bundle = given.ca_bundle or defaults.ca_bundle
    secrets = (*settings.images.pull_secrets, *children.image_pull_secrets, *given.image_pull_secrets)
    resources = defaults.resources if given.resources is None else given.resources
    return DownloadOptions(
        env={**_trusting(ca_bundle), **_by_name(defaults.env), **_by_name(given.env)},
        env_from=tuple(dict(source) for source in (*defaults.env_from, *given.env_from)),
        resources={
            part: {resource: str(quantity) for resource, quantity in quantities.items()}
            for part, quantities in (("limits", resources.limits), ("requests", resources.requests))
            if quantities
        },
        ca_volume=_ca_volume(ca_bundle) if ca_bundle else None,
        service_account_name=given.service_account_name or defaults.service_account_name or None,
        labels={**children.inherited.labels, **defaults.labels, **given.metadata.labels},
        annotations={**children.inherited.annotations, **defaults.annotations, **given.metadata.annotations},
        pull_secrets=secrets,
        security_context={**defaults.security_context, **given.security_context},
    )


def _by_name(variables: Iterable[Mapping[str, Any]]) -> dict[str, Manifest]:
    return {
        variable["name"]: {key: value for key, value in variable.items() if key != "name"} for variable in variables
    }


def _trusting(ca_bundle: Mapping[str, Any]) -> dict[str, Manifest]:
    return {name: {"value": f"{CA_FOLDER}/{_CA_FILE}"} for name in CA_VARIABLES} if ca_bundle else {}


def _ca_volume(ca_bundle: Mapping[str, Any]) -> Manifest:
    """Return the volume with the one key as a file, whatever the key is called."""
    is_secret = "secretKeyRef" in ca_bundle
    ref = ca_bundle["secretKeyRef" if is_secret else "configMapKeyRef"]
    source = {"items": [{"key": ref["key"], "path": _CA_FILE}]}
    if "optional" in ref:
        source["optional"] = ref["optional"]
    name = {"secretName": ref["name"]} if is_secret else {"name": ref["name"]}
    return {"name": CA_VOLUME, "secret" if is_secret else "configMap": {**name, **source}}
