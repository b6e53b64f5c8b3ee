"""What of a manifest means something else on a machine without a cluster: said once, never passed over in silence."""

from quire_operator.spec.children import DownloadSpec, MetadataSpec
from quire_operator.spec.llm_deployment import LLMDeployment, LLMDeploymentSpec

_NO_OBJECTS = "nothing is made in a cluster here"


def differences(deployment: LLMDeployment) -> list[str]:
    """Return one sentence per field that was set and means something else here."""
    spec = deployment.spec
    limits = {} if spec.resources is None else spec.resources.limits
    devices = sorted(name for name in limits if "/" in name)
    candidates = (
        (bool(spec.adapters), "spec.adapters: adapters are not served yet"),
        (
            spec.model.token_secret_ref is not None,
            "spec.model.tokenSecretRef: there are no Secrets here; set $HF_TOKEN",
        ),
        (
            spec.access.api_keys_secret is not None,
            "spec.access.apiKeysSecretRef: no Secrets here, so no key is asked for",
        ),
        (
            bool(spec.engine.env_sources),
            f"spec.engine.env: valueFrom is not read ({', '.join(spec.engine.env_sources)})",
        ),
        (
            any("$(" in token for token in spec.engine.extra_args),
            "spec.engine.extraArgs: $(NAME) is not replaced here; write the value",
        ),
        (bool(spec.scaling.schedules), "spec.scaling.schedules: not applied"),
        (bool(spec.profiles), "spec.profile: profiles belong to a cluster; the whole machine is used"),
        (bool(devices), f"spec.resources.limits: {', '.join(devices)} is not allotted; what the machine has is used"),
        (bool(spec.pod_template), "spec.podTemplate: there are no pods here"),
        (spec.expose.ingress is not None or spec.expose.http_route is not None, "spec.expose: not applied"),
        *_differences_of_objects(spec),
    )
    return [sentence for is_set, sentence in candidates if is_set]


def _differences_of_objects(spec: LLMDeploymentSpec) -> tuple[tuple[bool, str], ...]:
    cache, children, account = spec.cache, spec.children, spec.children.service_account
    return (
        (
            any((cache.existing_claim, cache.storage_class_name, cache.access_mode)),
            "spec.cache: there are no claims here; --cache-dir says where models are kept",
        ),
        (children.image is not None, "spec.image: there are no images here; the server that is installed runs"),
        (bool(children.image_pull_secrets), "spec.imagePullSecrets: there are no images here"),
        (account.name is not None or bool(account.annotations), f"spec.serviceAccount: {_NO_OBJECTS}"),
        (children.inherited != MetadataSpec(), f"spec.inheritedMetadata: {_NO_OBJECTS}"),
        (
            children.service.is_open_to_outside or bool(children.service.annotations),
            f"spec.service: {_NO_OBJECTS}; --host and --port say where it listens",
        ),
        (
            spec.download != DownloadSpec(),
            "spec.download: there is no Job here; the download has this process's environment",
        ),
    )
