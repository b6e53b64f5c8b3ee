"""Can this spec work on this cluster? What a schema cannot see, because it lies across fields or objects.

Every refusal names the field and the cure. A spec that is refused changes nothing: what was made before goes on. Knows
neither models nor pods; whether the model is there and fits are questions of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from quire_contract.flags.errors import UnservedFlagError
from quire_contract.model_facts import ModelFacts
from quire_contract.model_uri import Scheme, parse_model_uri
from quire_kube.objects import Manifest
from quire_operator.plan.actions import Verdict
from quire_operator.plan.cache.retries import read_retry_at
from quire_operator.plan.cache.volumes import Source, find_source
from quire_operator.plan.fit import EngineSettings, read_engine_settings
from quire_operator.plan.hardware import Hardware, pods_per_replica, resolve_hardware
from quire_operator.plan.profiles import check_profiles
from quire_operator.plan.resources.render import render_children, render_download_job
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.plan.resources.volume import access_modes_of
from quire_operator.spec.cron import find_cron_problem
from quire_operator.spec.kinds import LEADER_WORKER_SET, SERVICE_MONITOR
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_operator.spec.settings import Settings
from quire_operator.watch.cluster import ClusterFacts
from quire_operator.watch.observed import Observed

IMAGE_VOLUMES_SINCE: Final = (1, 35)
POD_TEMPLATE: Final = "spec.podTemplate"
_TRIAL_FACTS: Final = ModelFacts(path="model", bytes=0)
"""Stands for a model that is not there yet, to see whether documents can be made at all."""


class RefusedError(Exception):
    """The spec cannot work."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.verdict = Verdict(holds=False, reason=reason, message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A spec that can work, and what was read from it on the way."""

    deployment: LLMDeployment
    source: Source
    engine: EngineSettings
    hardware_by_profile: Mapping[str | None, Hardware]
    """In the order of the spec; None: that of `spec.resources`."""


def accept(observed: Observed, cluster: ClusterFacts, settings: Settings) -> Accepted:
    """Check an LLMDeployment.

    Raises:
        RefusedError: it cannot work.
    """
    try:
        return _accept(observed, cluster, settings)
    except SpecError as error:
        raise RefusedError(_reason_of(error), str(error)) from error


def _reason_of(error: SpecError) -> str:
    if isinstance(error.__cause__, UnservedFlagError):
        return "NotSupported"
    return "InvalidPodTemplate" if error.path.startswith(POD_TEMPLATE) else "InvalidSpec"


def read_manifest(manifest: Manifest) -> LLMDeployment | None:
    """Return the deployment, or None where its spec cannot be read."""
    try:
        return LLMDeployment.from_manifest(manifest)
    except SpecError:
        return None


def _accept(observed: Observed, cluster: ClusterFacts, settings: Settings) -> Accepted:
    deployment = LLMDeployment.from_manifest(observed.manifest)
    source = find_source(deployment)
    read_retry_at(observed.manifest)
    _check_served(deployment)
    _check_engine_served(deployment)
    _check_one_device(deployment)
    _check_model(deployment, cluster, settings)
    _check_claim(source, observed)
    engine = read_engine_settings(deployment)
    hardware_by_profile: dict[str | None, Hardware] = {
        profile: _resolve(deployment, settings, profile) for profile in deployment.spec.profiles or (None,)
    }
    check_profiles(deployment, settings)
    for profile, hardware in hardware_by_profile.items():
        _check_devices(deployment, cluster, hardware, profile)
    _check_scaling(deployment)
    _check_monitoring(deployment, cluster)
    accepted = Accepted(deployment=deployment, source=source, engine=engine, hardware_by_profile=hardware_by_profile)
    _check_documents(accepted, observed, cluster, settings)
    return accepted


def _check_served(deployment: LLMDeployment) -> None:
    """Refuse what the resource has a field for and nothing acts on yet: to ignore it would be a lie."""
    if deployment.spec.adapters:
        raise RefusedError("NotSupported", "spec.adapters: adapters are not served yet; remove them")
    expose = deployment.spec.expose
    fields = {"ingress": expose.ingress, "httpRoute": expose.http_route, "inferencePool": expose.inference_pool}
    for name, value in fields.items():
        if value:
            message = f"nothing is exposed yet; remove it, and lead your own route to Service {deployment.name}"
            raise RefusedError("NotSupported", f"spec.expose.{name}: {message}")
    if deployment.spec.access.api_keys_secret is not None:
        message = "nothing asks for keys yet, so all could use the model; remove it, and see who reaches the Service"
        raise RefusedError("NotSupported", f"spec.access.apiKeysSecretRef: {message}")


def _check_engine_served(deployment: LLMDeployment) -> None:
    """Refuse what the server refuses when it starts, before a model is fetched or a pod that serves is replaced."""
    engine = deployment.spec.engine
    cures = {
        "quantization": (engine.quantization is not None, "remove it; weights are used as the checkpoint has them"),
        "kvCacheDtype": (engine.kv_cache_dtype != "auto", "remove it, or set auto"),
        "speculative": (engine.speculative is not None, "remove it"),
    }
    for name, (is_asked, cure) in cures.items():
        if is_asked:
            raise RefusedError("NotSupported", f"spec.engine.{name}: this version's server does not do that; {cure}")


def _check_one_device(deployment: LLMDeployment) -> None:
    """Refuse more devices than the server uses. All else is ready for them: the next server needs only this to go."""
    engine = deployment.spec.engine
    sizes = {"tensorParallelSize": engine.tensor_parallel_size, "pipelineParallelSize": engine.pipeline_parallel_size}
    for name, size in sizes.items():
        if size > 1:
            message = "this version's server uses one device; remove it, or set 1"
            raise RefusedError("NotSupported", f"spec.engine.{name}: {message}")


def _check_model(deployment: LLMDeployment, cluster: ClusterFacts, settings: Settings) -> None:
    scheme = parse_model_uri(deployment.spec.model.uri).scheme
    if scheme is Scheme.FILE:
        raise RefusedError(
            "UnsupportedModelUri",
            "spec.model.uri: file:// is only for `quire up`; put the files into a PersistentVolumeClaim and write"
            " pvc://claim/path",
        )
    has_images = settings.image_volumes
    if scheme is Scheme.OCI and not (cluster.version >= IMAGE_VOLUMES_SINCE if has_images is None else has_images):
        version = ".".join(map(str, cluster.version))
        since = ".".join(map(str, IMAGE_VOLUMES_SINCE))
        raise RefusedError(
            "ImageVolumesUnsupported",
            f"spec.model.uri: oci:// needs image volumes, which Kubernetes {version} does not have by default (since"
            f" {since}); use another source, or set imageVolumes in the operator's settings where the feature is on",
        )


def _check_claim(source: Source, observed: Observed) -> None:
    if source.is_users_claim and observed.volume is None:
        message = f"{source.field}: there is no PersistentVolumeClaim {source.claim} in this namespace; create it"
        raise RefusedError("ClaimMissing", message)


def _resolve(deployment: LLMDeployment, settings: Settings, profile: str | None) -> Hardware:
    try:
        return resolve_hardware(deployment, settings, profile)
    except SpecError as error:
        if error.path.startswith(POD_TEMPLATE):
            raise
        is_known = profile is None or profile in settings.profiles
        raise RefusedError("InvalidResources" if is_known else "UnknownProfile", str(error)) from error


def _check_devices(deployment: LLMDeployment, cluster: ClusterFacts, hardware: Hardware, profile: str | None) -> None:
    num_pods = pods_per_replica(deployment, hardware)
    if num_pods == 1 or cluster.has(LEADER_WORKER_SET):
        return
    where = "spec.resources" if profile is None else f"profile {profile!r}"
    raise RefusedError(
        "LeaderWorkerSetMissing",
        f"spec.engine: a replica of {num_pods} pods (tensorParallelSize × pipelineParallelSize devices by {where})"
        " needs the LeaderWorkerSet API, which the cluster lacks; install it, or ask for as many GPUs in one pod",
    )


def _check_scaling(deployment: LLMDeployment) -> None:
    scaling = deployment.spec.scaling
    if scaling.mode == "HPA":
        raise RefusedError(
            "ScalingModeUnsupported",
            'spec.scaling.mode: HPA is not offered by this version; use Auto, KEDA, Builtin or "Off"',
        )
    for index, schedule in enumerate(scaling.schedules):
        for field, text in (("start", schedule.start), ("end", schedule.end)):
            problem = find_cron_problem(text)
            if problem is not None:
                raise SpecError(f"spec.scaling.schedules[{index}].{field}", problem)


def _check_monitoring(deployment: LLMDeployment, cluster: ClusterFacts) -> None:
    if deployment.spec.observability.service_monitor == "always" and not cluster.has(SERVICE_MONITOR):
        raise RefusedError(
            "ServiceMonitorMissing",
            "spec.observability.serviceMonitor: always, but the cluster has no ServiceMonitor API; install the"
            " Prometheus operator, or set auto",
        )


def _check_documents(accepted: Accepted, observed: Observed, cluster: ClusterFacts, settings: Settings) -> None:
    """See whether every document can be made (podTemplate merges), before any is sent."""
    claim, access_modes = accepted.source.claim, access_modes_of(observed.volume)
    for hardware in accepted.hardware_by_profile.values():
        if claim is not None:
            render_download_job(accepted.deployment, settings, hardware, claim, access_modes=access_modes)
        render_children(
            RenderInput(
                deployment=accepted.deployment,
                settings=settings,
                cluster=cluster,
                hardware=hardware,
                claim=claim,
                facts=None if claim is None else _TRIAL_FACTS,
                access_modes=access_modes,
                replicas=1,
                load_budget_s=1.0,
                target_pending_per_replica=1,
            )
        )
