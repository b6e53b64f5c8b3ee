"""The pod that runs `quire serve`: one template for Deployments and LeaderWorkerSets.

Knows no workload: how many pods there are and how they are replaced. `spec.podTemplate` is merged in last, so that it
wins over everything but the labels by which the pods are found.

Invariant: only the startup probe's failure threshold depends on the load budget, so that what is learned about cold
starts never changes `revision.template_revision`.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

from quire_contract import environment, names, paths, ports
from quire_contract.model_uri import parse_model_uri
from quire_contract.units import parse_quantity
from quire_kube.objects import Manifest
from quire_operator.plan.hardware import CONTAINER, Hardware
from quire_operator.plan.resources.child import whole_seconds
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.plan.resources.security import container_security_context, pod_security_context
from quire_operator.plan.resources.services import HTTP_PORT_NAME
from quire_operator.plan.resources.volume import HOSTNAME, affinity_to_volume, claim_label
from quire_operator.plan.resources.workload.merge import merge_strategically
from quire_operator.plan.server_arguments import server_arguments
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError

TMP: Final = "/tmp"
_DOLLAR: Final = re.compile(r"\$(?:\((?P<name>[^)]*)\))?")
_TERMINATION_SLACK_S: Final = 10
"""For the process to end after its last request, and for the kubelet to notice."""
_HANG_GRACE_S: Final = 10
"""A process that hangs does not drain."""
_SMALL_MODEL_BYTES: Final = 4 << 30
"""A model below this may be up within seconds, so it is looked at every second."""
_SHM_BASE_MI: Final = 256
_SHM_PER_RANK_MI: Final = 2048
"""Buffers by which the processes of a tensor-parallel group exchange activations."""


def build_pod_template(
    given: RenderInput, *, extra_arguments: Sequence[str] = (), is_answering: bool = True
) -> Manifest:
    """Return a pod template, without its revision label. A pod that is not answering has no probes: it has no HTTP.

    Raises:
        SpecError: `spec.podTemplate` cannot be merged, or takes away what the operator finds its pods by.
    """
    deployment, inherited = given.deployment, given.deployment.spec.children.inherited
    labels = names.common_labels(deployment.name, names.COMPONENT_SERVER)
    if given.claim is not None:
        labels |= claim_label(given.claim)
    template: Manifest = {
        "metadata": {
            "labels": {**inherited.labels, **labels},
            "annotations": {"kubectl.kubernetes.io/default-container": CONTAINER, **inherited.annotations},
        },
        "spec": {
            **_placement(given),
            "serviceAccountName": deployment.spec.children.service_account.name or names.workload_name(deployment.name),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": pod_security_context(given.settings),
            "terminationGracePeriodSeconds": grace_period_s(deployment),
            "containers": [_container(given, extra_arguments, is_answering)],
            "volumes": _volumes(given),
        },
    }
    merged = _merge_users(template, deployment.spec.pod_template, labels)
    if is_answering:
        _check_answers(merged)
    return merged


def grace_period_s(deployment: LLMDeployment) -> int:
    """Return how long a pod may take to end: it goes on serving, then drains, then stops."""
    drain = deployment.spec.drain
    return whole_seconds(drain.pre_stop_s) + whole_seconds(drain.timeout_s) + _TERMINATION_SLACK_S


def model_path(given: RenderInput) -> str:
    """Return where the server finds the model."""
    if given.facts is None:
        return paths.MODELS_MOUNT
    return str(PurePosixPath(paths.MODELS_MOUNT) / given.facts.path)


def pull_secrets(secrets: Sequence[str]) -> Manifest:
    """Return the field that names the Secrets which images are pulled with; nothing where there are none."""
    return {"imagePullSecrets": [{"name": secret} for secret in dict.fromkeys(secrets)]} if secrets else {}


def as_literal(text: str, *, references: Collection[str] = ()) -> str:
    """Write an argument so that a kubelet passes it on as it is: in arguments `$(NAME)` is replaced, and `$$` is a `$`.

    Only `$(NAME)` of a name in `references` is left to be replaced.
    """
    return _DOLLAR.sub(lambda found: found[0] if found["name"] in references else found[0].replace("$", "$$"), text)


def _placement(given: RenderInput) -> Manifest:
    """Return where pods run."""
    hardware = given.hardware
    near = None if given.claim is None else affinity_to_volume(given.deployment, given.claim, given.access_modes)
    placement: Manifest = {
        **(_spread(given) if near is None else {"affinity": near}),
        **pull_secrets((*given.settings.images.pull_secrets, *given.deployment.spec.children.image_pull_secrets)),
    }
    for field, value in (
        ("nodeSelector", dict(hardware.node_selector)),
        ("tolerations", [dict(toleration) for toleration in hardware.tolerations]),
        ("runtimeClassName", hardware.runtime_class_name),
        ("priorityClassName", given.settings.priority_class_name),
    ):
        if value:
            placement[field] = value
    return placement


def _spread(given: RenderInput) -> Manifest:
    """Prefer one pod per node. One node may hold them all if it must, so that a small cluster can scale too."""
    return {
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": HOSTNAME,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": names.selector_labels(given.deployment.name)},
            }
        ]
    }


def _container(given: RenderInput, extra_arguments: Sequence[str], is_answering: bool) -> Manifest:
    container: Manifest = {
        "name": CONTAINER,
        "image": given.deployment.spec.children.image or given.hardware.image,
        "imagePullPolicy": given.settings.images.pull_policy,
        "args": ["serve", *_arguments(given), *extra_arguments],
        "env": _env(given),
        "resources": {
            part: dict(quantities)
            for part, quantities in (("limits", given.hardware.limits), ("requests", given.hardware.requests))
            if quantities
        },
        "securityContext": container_security_context(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "model", "mountPath": paths.MODELS_MOUNT, "readOnly": True},
            {"name": "tmp", "mountPath": TMP},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if is_answering:
        container["ports"] = [{"name": HTTP_PORT_NAME, "containerPort": ports.SERVER_HTTP, "protocol": "TCP"}]
        container |= _probes(given)
        pre_stop_s = whole_seconds(given.deployment.spec.drain.pre_stop_s)
        if pre_stop_s:
            container["lifecycle"] = {"preStop": {"sleep": {"seconds": pre_stop_s}}}
    return container


def _arguments(given: RenderInput) -> list[str]:
    """Return the server's arguments. Further ones may refer to the variables that stand beside them."""
    engine = given.deployment.spec.engine
    ours = server_arguments(given.deployment, model=model_path(given), host="0.0.0.0", port=ports.SERVER_HTTP)
    variables = {*engine.env, *engine.env_sources}
    return [*map(as_literal, ours), *(as_literal(token, references=variables) for token in engine.extra_args)]


def _probes(given: RenderInput) -> Manifest:
    """Return the three probes. The first alone waits for the model; the last asks only whether the process is alive."""
    is_small = given.facts is not None and given.facts.bytes < _SMALL_MODEL_BYTES
    period_s = 1 if is_small else 5
    ready = {"httpGet": {"path": paths.READYZ, "port": HTTP_PORT_NAME}, "timeoutSeconds": 5}
    alive = {"httpGet": {"path": paths.LIVEZ, "port": HTTP_PORT_NAME}, "timeoutSeconds": 5}
    return {
        "startupProbe": {
            **ready,
            "periodSeconds": period_s,
            "failureThreshold": max(math.ceil(given.load_budget_s / period_s), 1),
            "terminationGracePeriodSeconds": _HANG_GRACE_S,
        },
        "readinessProbe": {**ready, "periodSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {
            **alive,
            "periodSeconds": 10,
            "failureThreshold": 6,
            "terminationGracePeriodSeconds": _HANG_GRACE_S,
        },
    }


def _env(given: RenderInput) -> list[Manifest]:
    """Return the variables. The user's come last and win; those read from elsewhere first, so that `$(NAME)` works.

    Their order says something only where a value may refer to another; elsewhere a reordered list rolls nothing out.
    """
    engine = given.deployment.spec.engine
    variables: dict[str, Manifest] = {
        "HOME": {"value": TMP},
        "HF_HUB_OFFLINE": {"value": "1"},
        "TRANSFORMERS_OFFLINE": {"value": "1"},
        environment.CPU_LIMIT: _limit("limits.cpu"),
        environment.MEMORY_LIMIT: _limit("limits.memory"),
    }
    num_threads = _num_threads(given.hardware)
    if num_threads is not None:
        variables["OMP_NUM_THREADS"] = {"value": str(num_threads)}
    users: dict[str, Manifest] = {
        **{name: {"valueFrom": dict(source)} for name, source in engine.env_sources.items()},
        **{name: {"value": value} for name, value in engine.env.items()},
    }
    if not any("$(" in value for value in engine.env.values()):
        users = dict(sorted(users.items()))
    ours = {name: variable for name, variable in variables.items() if name not in users}
    return [{"name": name, **variable} for name, variable in (ours | users).items()]


def _limit(resource: str) -> Manifest:
    """Read a limit of the container, rounded up; of the node, where the container has none."""
    return {"valueFrom": {"resourceFieldRef": {"resource": resource, "divisor": "1"}}}


def _num_threads(hardware: Hardware) -> int | None:
    """One thread per whole CPU of the limit: a thread more would wait for the quota, and the others for it."""
    if hardware.num_gpus or "cpu" not in hardware.limits:
        return None
    return max(math.floor(parse_quantity(hardware.limits["cpu"])), 1)


def _volumes(given: RenderInput) -> list[Manifest]:
    engine = given.deployment.spec.engine
    num_ranks = min(engine.tensor_parallel_size, given.hardware.num_gpus or engine.tensor_parallel_size)
    shm_mi = _SHM_BASE_MI + (_SHM_PER_RANK_MI * num_ranks if num_ranks > 1 else 0)
    return [
        {"name": "model", **_model_source(given)},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_mi}Mi"}},
    ]


def _model_source(given: RenderInput) -> Manifest:
    uri = parse_model_uri(given.deployment.spec.model.uri)
    if given.claim is not None:
        # A disk that a download wrote to may still be attached for writing, so that only the mount can be read-only.
        read_only = {} if uri.is_downloaded else {"readOnly": True}
        return {"persistentVolumeClaim": {"claimName": given.claim, **read_only}}
    return {"image": {"reference": f"{uri.authority}/{uri.path}", "pullPolicy": "IfNotPresent"}}


def _merge_users(template: Manifest, users: Mapping[str, Any], labels: Mapping[str, str]) -> Manifest:
    """Merge the user's template; refuse one by which the pods or the server could not be found."""
    path = "spec.podTemplate"
    for field in users:
        if field not in ("metadata", "spec"):
            raise SpecError(f"{path}.{field}", "is no field of a pod template, which has metadata and spec")
    merged = merge_strategically(template, users, path)
    merged_labels = (merged.get("metadata") or {}).get("labels") or {}
    for label in (*labels, names.LABEL_REVISION):
        if merged_labels.get(label) != labels.get(label):
            raise SpecError(f"{path}.metadata.labels[{label}]", "belongs to the operator; remove it")
    containers = (merged.get("spec") or {}).get("containers") or []
    if not any(container.get("name") == CONTAINER for container in containers):
        raise SpecError(f"{path}.spec.containers", f"must keep the container {CONTAINER!r}, which runs the model")
    return merged


def _check_answers(template: Manifest) -> None:
    """Refuse a server that the Services would not find, or that would be called ready before it is."""
    path = f"spec.podTemplate.spec.containers[{CONTAINER}]"
    container = next(one for one in template["spec"]["containers"] if one.get("name") == CONTAINER)
    ports_there = {(port.get("name"), port.get("containerPort")) for port in container.get("ports") or ()}
    if (HTTP_PORT_NAME, ports.SERVER_HTTP) not in ports_there:
        message = f"must keep port {ports.SERVER_HTTP} by the name {HTTP_PORT_NAME!r}: Services and probes lead there"
        raise SpecError(f"{path}.ports", message)
    if not container.get("readinessProbe"):
        raise SpecError(f"{path}.readinessProbe", "must stay: by it clients are kept from a server that is not ready")
