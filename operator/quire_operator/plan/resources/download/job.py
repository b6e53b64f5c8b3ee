"""The Job that brings a model into a volume: `quire download`, the only pod that sees a token or the network.

A Job is immutable: one that should be different is deleted and made again. Its digest leaves out which attempt it is
and where it runs, so that only a change of what it does tells the two apart. It runs where the model is to be served:
where a volume is made for its first pod, that pod decides which nodes can ever mount it; and beside the pods that have
the volume, where it can be attached to one node alone.
"""

from collections.abc import Sequence

from quire_contract import environment, names, paths, ports
from quire_contract.model_uri import Scheme, parse_model_uri
from quire_kube.objects import Manifest
from quire_operator.plan.hardware import Hardware
from quire_operator.plan.resources.child import digest, with_applied_hash
from quire_operator.plan.resources.download.options import CA_FOLDER, CA_VOLUME, DownloadOptions, download_options
from quire_operator.plan.resources.security import container_security_context, pod_security_context
from quire_operator.plan.resources.volume import affinity_to_volume, claim_label, model_annotations, shared_labels
from quire_operator.plan.resources.workload.merge import merge_strategically
from quire_operator.plan.resources.workload.pod import TMP, as_literal, pull_secrets
from quire_operator.spec.kinds import JOB
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import Settings

CONTAINER = names.COMPONENT_DOWNLOAD
_BACKOFF_LIMIT = 6
_GRACE_PERIOD_S = 10
"""A download that is interrupted is taken up again; there is nothing to finish."""


def render_download_job(
    deployment: LLMDeployment,
    settings: Settings,
    hardware: Hardware,
    claim: str,
    *,
    access_modes: Sequence[str] = (),
    attempt: int = 1,
) -> Manifest:
    """Build the Job that fills `claim`; for a pvc:// model, that checks what is in it.

    Of `hardware` and `spec.podTemplate`, only where pods run counts: the download itself needs no GPU. `access_modes`
    are the claim's; empty where there is none yet.
    """
    model, options = deployment.spec.model, download_options(deployment, settings)
    labels = {**options.labels, **shared_labels(deployment, names.COMPONENT_DOWNLOAD)}
    annotations = {**options.annotations, **model_annotations(deployment)}
    job = with_applied_hash(
        {
            "apiVersion": JOB.api_version,
            "kind": JOB.kind,
            "metadata": {
                "name": names.download_job_name(model.uri, model.revision, claim),
                "namespace": deployment.namespace,
                "labels": labels,
                "annotations": annotations,
            },
            "spec": {
                "backoffLimit": _BACKOFF_LIMIT,
                "template": {
                    "metadata": {"labels": labels, "annotations": annotations},
                    "spec": _pod_spec(deployment, settings, options, claim),
                },
            },
        }
    )
    placement = _placement(deployment, hardware, claim, access_modes)
    job["metadata"]["annotations"] |= {
        names.ANNOTATION_ATTEMPT: str(attempt),
        names.ANNOTATION_PLACEMENT: digest(placement),
    }
    template = job["spec"]["template"]
    template["metadata"] = {**template["metadata"], "labels": labels | claim_label(claim)}
    template["spec"] |= placement
    return job


def _placement(deployment: LLMDeployment, hardware: Hardware, claim: str, access_modes: Sequence[str]) -> Manifest:
    """Return where the pods run: on nodes where the model's may.

    What a template says of other pods is left out. The model's pods can wait for none that is not there yet, themselves
    included, and keep away from one another; a download that waited likewise would hold them up for ever.
    """
    template = deployment.spec.pod_template.get("spec") or {}
    users = {field: template[field] for field in ("nodeSelector", "tolerations", "affinity") if field in template}
    if isinstance(users.get("affinity"), dict):
        users["affinity"] = {key: value for key, value in users["affinity"].items() if key == "nodeAffinity"}
    ours: Manifest = {
        "nodeSelector": dict(hardware.node_selector),
        "tolerations": [dict(toleration) for toleration in hardware.tolerations],
        "affinity": {},
    }
    placement = merge_strategically(ours, users, "spec.podTemplate.spec")
    beside_volume = affinity_to_volume(deployment, claim, access_modes) or {}
    placement["affinity"] = {**(placement.get("affinity") or {}), **beside_volume}
    if hardware.gpu_resource is not None and (placement.get("nodeSelector") or placement["affinity"]):
        # A pod that asks for GPUs is given this one on admission (ExtendedResourceToleration); this pod asks for none.
        admitted = {"key": hardware.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
        tolerations = placement.get("tolerations") or []
        placement["tolerations"] = [*tolerations, *([] if admitted in tolerations else [admitted])]
    return {field: value for field, value in placement.items() if value}


def _pod_spec(deployment: LLMDeployment, settings: Settings, options: DownloadOptions, claim: str) -> Manifest:
    is_read_only = not parse_model_uri(deployment.spec.model.uri).is_downloaded
    account = {} if options.service_account_name is None else {"serviceAccountName": options.service_account_name}
    return {
        "restartPolicy": "Never",
        **account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {**pod_security_context(settings), **options.security_context},
        "terminationGracePeriodSeconds": _GRACE_PERIOD_S,
        **pull_secrets(options.pull_secrets),
        "containers": [_container(deployment, settings, options, is_read_only)],
        "volumes": [
            {
                "name": "model",
                "persistentVolumeClaim": {"claimName": claim, **({"readOnly": True} if is_read_only else {})},
            },
            {"name": "tmp", "emptyDir": {}},
            *([] if options.ca_volume is None else [options.ca_volume]),
        ],
    }


def _container(deployment: LLMDeployment, settings: Settings, options: DownloadOptions, is_read_only: bool) -> Manifest:
    model = deployment.spec.model
    revision = [f"--revision={model.revision}"] if model.revision is not None else []
    where = ["--directory", paths.MODELS_MOUNT, "--progress-port", str(ports.DOWNLOAD_PROGRESS)]
    container: Manifest = {
        "name": CONTAINER,
        "image": settings.images.download or settings.images.server_cpu,
        "imagePullPolicy": settings.images.pull_policy,
        "args": ["download", *map(as_literal, (model.uri, *revision)), *where],
        "env": _env(deployment, settings, options),
        "ports": [{"name": "progress", "containerPort": ports.DOWNLOAD_PROGRESS, "protocol": "TCP"}],
        "resources": options.resources,
        "securityContext": container_security_context(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "model", "mountPath": paths.MODELS_MOUNT, **({"readOnly": True} if is_read_only else {})},
            {"name": "tmp", "mountPath": TMP},
            *([] if options.ca_volume is None else [{"name": CA_VOLUME, "mountPath": CA_FOLDER, "readOnly": True}]),
        ],
    }
    if options.env_from:
        container["envFrom"] = list(options.env_from)
    return container


def _env(deployment: LLMDeployment, settings: Settings, options: DownloadOptions) -> list[Manifest]:
    """Return the variables; those that somebody names win over what they would be."""
    variables: dict[str, Manifest] = {"HOME": {"value": TMP}}
    if settings.download.hub_endpoint:
        variables["HF_ENDPOINT"] = {"value": settings.download.hub_endpoint}
    token = deployment.spec.model.token_secret_ref
    if token is not None:
        is_http = parse_model_uri(deployment.spec.model.uri).scheme in (Scheme.HTTP, Scheme.HTTPS)
        name = environment.HTTP_TOKEN if is_http else environment.HF_TOKEN
        variables[name] = {"valueFrom": {"secretKeyRef": {"name": token.name, "key": token.key}}}
    ours = {name: variable for name, variable in variables.items() if name not in options.env}
    return [{"name": name, **variable} for name, variable in (ours | dict(options.env)).items()]
