"""The LLMDeployment as frozen dataclasses: what the operator and `quire up` decide from.

`LLMDeployment.from_manifest` fills the CRD's defaults, drops fields that this version does not know, and turns texts
into values (durations to seconds, sizes to bytes). Every field of the CRD's spec is here once. Knows no cluster. A
manifest is judged by `validation.py`, or by the API server that stored it; here only what could not be read raises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from quire_contract.crd import load_schema
from quire_contract.model_uri import ModelUriError, parse_model_uri
from quire_contract.units import UnitError, parse_duration, parse_quantity
from quire_operator.spec.children import ChildrenSpec, DownloadSpec, ResourcesSpec, read_children, read_download
from quire_operator.spec.expose import ExposeSpec, read_expose
from quire_operator.spec.schema import find_problems, with_defaults

IDLE_TO_ZERO_AFTER_S = 600.0
"""Where `scaling.min` is 0 and `idleToZeroAfter` is absent. No CRD default: beside another min it would be refused."""

_Parsed = TypeVar("_Parsed")


class SpecError(ValueError):
    """A field cannot be read. `path` is the field's, such as `spec.model.uri`."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretKeyRef:
    name: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    uri: str
    """A model URI that `parse_model_uri` takes."""
    revision: str | None
    served_names: tuple[str, ...]
    token_secret_ref: SecretKeyRef | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeSpec:
    method: Literal["ngram", "draft_model", "eagle", "eagle3"]
    model: str | None
    num_speculative_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    max_model_len: int | None
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    quantization: str | None
    kv_cache_dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    max_num_seqs: int
    speculative: SpeculativeSpec | None
    extra_args: tuple[str, ...]
    env: Mapping[str, str]
    """Variables with a value."""
    env_sources: Mapping[str, Mapping[str, Any]]
    """Variables that a pod reads from elsewhere: name to `valueFrom`, as in a container."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    start: str
    end: str
    timezone: str
    min: int | None
    max: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSpec:
    mode: Literal["Auto", "KEDA", "HPA", "Builtin", "Off"]
    min: int
    max: int
    target_pending_per_replica: int | None
    """None: auto."""
    scale_down_delay_s: float
    idle_to_zero_after_s: float | None
    """None: never, because min is above 0."""
    cold_start_timeout_s: float
    schedules: tuple[ScheduleSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    size_bytes: int | None
    """None: auto."""
    storage_class_name: str | None
    access_mode: str | None
    existing_claim: str | None
    retain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySpec:
    max_queue: int
    cold_start: Literal["Hold", "Reject"]
    heartbeat_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    name: str
    uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    strategy: Literal["Surge", "Replace"]
    wait_for_idle_s: float
    progress_deadline_s: float | None
    """None: auto."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainSpec:
    timeout_s: float
    pre_stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSpec:
    api_keys_secret: str | None
    network_policy: Literal["Restricted", "Open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilitySpec:
    service_monitor: Literal["auto", "always", "never"]
    alerts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMDeploymentSpec:
    model: ModelSpec
    engine: EngineSpec
    resources: ResourcesSpec | None
    profiles: tuple[str, ...]
    """`profile` or `profiles`, best first; empty where resources are given."""
    replicas: int | None
    """None: nobody has set it yet; start at scaling.min, at least 1."""
    scaling: ScalingSpec
    cache: CacheSpec
    children: ChildrenSpec
    download: DownloadSpec
    gateway: GatewaySpec
    adapters: tuple[AdapterSpec, ...]
    rollout: RolloutSpec
    drain: DrainSpec
    access: AccessSpec
    expose: ExposeSpec
    observability: ObservabilitySpec
    suspend: bool
    pod_template: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMDeployment:
    """One LLMDeployment: who it is and what is wanted of it."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    spec: LLMDeploymentSpec

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> "LLMDeployment":
        """Read a manifest, or an object as an API server returns it.

        Raises:
            SpecError: a field is missing, of the wrong type, or holds no readable value.
        """
        metadata = manifest.get("metadata") or {}
        if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
            raise SpecError("metadata.name", "is required")
        schema = load_schema()["properties"]["spec"]
        stored = with_defaults(manifest.get("spec") or {}, schema, is_pruning=True)
        for problem in find_problems(stored, schema, "spec"):
            raise SpecError(problem.path, problem.message)
        return cls(
            name=metadata["name"],
            namespace=metadata.get("namespace") or "default",
            uid=metadata.get("uid", ""),
            generation=metadata.get("generation", 0),
            spec=_read_spec(metadata["name"], stored),
        )


def _read_spec(name: str, spec: dict[str, Any]) -> LLMDeploymentSpec:
    rollout, drain = spec["rollout"], spec["drain"]
    keys_ref = spec["access"].get("apiKeysSecretRef")
    return LLMDeploymentSpec(
        model=_read_model(name, spec["model"]),
        engine=_read_engine(spec["engine"]),
        resources=_read_resources(spec["resources"], "spec.resources") if "resources" in spec else None,
        profiles=(spec["profile"],) if "profile" in spec else tuple(spec.get("profiles", ())),
        replicas=spec.get("replicas"),
        scaling=_read_scaling(spec["scaling"]),
        cache=_read_cache(spec.get("cache", {})),
        children=read_children(spec),
        download=_read_download(spec.get("download", {})),
        gateway=GatewaySpec(
            max_queue=spec["gateway"]["maxQueue"],
            cold_start=spec["gateway"]["coldStart"],
            heartbeat_s=_duration(spec["gateway"], "heartbeat", "spec.gateway"),
        ),
        adapters=tuple(
            AdapterSpec(name=a["name"], uri=_uri(a, f"spec.adapters[{i}].uri")) for i, a in enumerate(spec["adapters"])
        ),
        rollout=RolloutSpec(
            strategy=rollout["strategy"],
            wait_for_idle_s=_duration(rollout, "waitForIdle", "spec.rollout"),
            progress_deadline_s=_duration_or_auto(rollout, "progressDeadline", "spec.rollout"),
        ),
        drain=DrainSpec(
            timeout_s=_duration(drain, "timeout", "spec.drain"), pre_stop_s=_duration(drain, "preStop", "spec.drain")
        ),
        access=AccessSpec(
            api_keys_secret=keys_ref["name"] if keys_ref else None, network_policy=spec["access"]["networkPolicy"]
        ),
        expose=read_expose(spec["expose"]),
        observability=ObservabilitySpec(
            service_monitor=spec["observability"]["serviceMonitor"], alerts=spec["observability"]["alerts"]
        ),
        suspend=spec["suspend"],
        pod_template=spec.get("podTemplate", {}),
    )


def _read_model(name: str, model: dict[str, Any]) -> ModelSpec:
    ref = model.get("tokenSecretRef")
    return ModelSpec(
        uri=_uri(model, "spec.model.uri"),
        revision=model.get("revision"),
        served_names=tuple(model.get("servedNames", (name,))),
        token_secret_ref=SecretKeyRef(name=ref["name"], key=ref["key"]) if ref else None,
    )


def _read_engine(engine: dict[str, Any]) -> EngineSpec:
    speculative = engine.get("speculative")
    return EngineSpec(
        max_model_len=engine.get("maxModelLen"),
        dtype=engine["dtype"],
        quantization=engine.get("quantization"),
        kv_cache_dtype=engine["kvCacheDtype"],
        tensor_parallel_size=engine["tensorParallelSize"],
        pipeline_parallel_size=engine["pipelineParallelSize"],
        max_num_seqs=engine["maxNumSeqs"],
        speculative=SpeculativeSpec(
            method=speculative["method"],
            model=_uri(speculative, "spec.engine.speculative.model", "model") if "model" in speculative else None,
            num_speculative_tokens=speculative["numSpeculativeTokens"],
        )
        if speculative
        else None,
        extra_args=tuple(engine["extraArgs"]),
        env={e["name"]: e.get("value", "") for e in engine["env"] if "valueFrom" not in e},
        env_sources={e["name"]: e["valueFrom"] for e in engine["env"] if "valueFrom" in e},
    )


def _read_download(download: dict[str, Any]) -> DownloadSpec:
    path = "spec.download.resources"
    return read_download(download, _read_resources(download["resources"], path) if "resources" in download else None)


def _read_resources(resources: dict[str, Any], path: str) -> ResourcesSpec:
    read = {}
    for kind in ("limits", "requests"):
        quantities = {key: str(value) for key, value in resources.get(kind, {}).items()}
        for key, text in quantities.items():
            _parse(parse_quantity, text, f"{path}.{kind}[{key}]")
        read[kind] = quantities
    return ResourcesSpec(limits=read["limits"], requests=read["requests"])


def _read_scaling(scaling: dict[str, Any]) -> ScalingSpec:
    target = scaling["targetPendingPerReplica"]
    if target != "auto" and not isinstance(target, int):
        raise SpecError("spec.scaling.targetPendingPerReplica", "must be auto or an integer")
    idle_s: float | None = IDLE_TO_ZERO_AFTER_S
    if "idleToZeroAfter" in scaling:
        idle_s = _duration(scaling, "idleToZeroAfter", "spec.scaling")
    return ScalingSpec(
        mode=scaling["mode"],
        min=scaling["min"],
        max=scaling["max"],
        target_pending_per_replica=None if target == "auto" else target,
        scale_down_delay_s=_duration(scaling, "scaleDownDelay", "spec.scaling"),
        idle_to_zero_after_s=idle_s if scaling["min"] == 0 else None,
        cold_start_timeout_s=_duration(scaling, "coldStartTimeout", "spec.scaling"),
        schedules=tuple(
            ScheduleSpec(start=s["start"], end=s["end"], timezone=s["timezone"], min=s.get("min"), max=s.get("max"))
            for s in scaling["schedules"]
        ),
    )


def _read_cache(given: dict[str, Any]) -> CacheSpec:
    """Read `spec.cache`, whose defaults an API server fills in only where a part of it is given."""
    cache = with_defaults(given, load_schema()["properties"]["spec"]["properties"]["cache"])
    size = None if cache["size"] == "auto" else _parse(parse_quantity, str(cache["size"]), "spec.cache.size")
    return CacheSpec(
        size_bytes=None if size is None else int(size),
        storage_class_name=cache.get("storageClassName"),
        access_mode=cache.get("accessMode"),
        existing_claim=cache.get("existingClaim"),
        retain=cache["retain"],
    )


def _uri(fields: dict[str, Any], path: str, key: str = "uri") -> str:
    return str(_parse(parse_model_uri, fields[key], path))


def _duration(fields: dict[str, Any], key: str, path: str) -> float:
    return _parse(parse_duration, fields[key], f"{path}.{key}")


def _duration_or_auto(fields: dict[str, Any], key: str, path: str) -> float | None:
    return None if fields[key] == "auto" else _duration(fields, key, path)


def _parse(parse: Callable[[str], _Parsed], text: str, path: str) -> _Parsed:
    try:
        return parse(text)
    except (ModelUriError, UnitError) as error:
        raise SpecError(path, str(error)) from None
