"""What of a manifest means something else on a machine without a cluster: said once, never passed over in silence."""

from quire_operator.spec.llm_deployment import LLMDeployment


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
    )
    return [sentence for is_set, sentence in candidates if is_set]
