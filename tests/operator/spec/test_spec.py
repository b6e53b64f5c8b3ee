"""Reading an LLMDeployment: defaults, units, and the path in every error."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire_contract.crd import load_schema
from quire_operator.spec import llm_deployment as spec_module
from quire_operator.spec.children import (
    ChildrenSpec,
    DownloadSpec,
    MetadataSpec,
    ResourcesSpec,
    ServiceAccountSpec,
    ServiceSpec,
)
from quire_operator.spec.expose import ExposeSpec, HttpRouteSpec, IngressSpec, ParentRef
from quire_operator.spec.llm_deployment import (
    AdapterSpec,
    LLMDeployment,
    LLMDeploymentSpec,
    ScheduleSpec,
    SecretKeyRef,
    SpecError,
    SpeculativeSpec,
)


def _read(spec: dict[str, Any], **metadata: Any) -> LLMDeployment:
    base = {"model": {"uri": "hf://org/model"}}
    return LLMDeployment.from_manifest({"metadata": {"name": "m", **metadata}, "spec": base | spec})


@pytest.fixture(scope="module")
def full() -> LLMDeploymentSpec:
    cases = yaml.safe_load((Path(__file__).parents[1] / "verdicts" / "good.yaml").read_text())
    (case,) = (case for case in cases if case["case"] == "everything of the design")
    return _read(case["spec"]).spec


def test_a_bare_manifest_gets_the_defaults() -> None:
    deployment = _read({})
    spec = deployment.spec
    assert (deployment.name, deployment.namespace) == ("m", "default")
    assert spec.model.served_names == ("m",)
    assert (spec.model.revision, spec.model.token_secret_ref, spec.replicas) == (None, None, None)
    assert (spec.engine.dtype, spec.engine.max_num_seqs, spec.engine.tensor_parallel_size) == ("auto", 64, 1)
    assert (spec.engine.max_model_len, spec.engine.speculative, spec.engine.extra_args) == (None, None, ())
    assert (spec.scaling.mode, spec.scaling.min, spec.scaling.max) == ("Auto", 0, 1)
    assert (spec.scaling.scale_down_delay_s, spec.scaling.idle_to_zero_after_s) == (300.0, 600.0)
    assert (spec.scaling.cold_start_timeout_s, spec.scaling.target_pending_per_replica) == (900.0, None)
    assert (spec.cache.size_bytes, spec.cache.retain) == (None, True)
    assert spec.children == ChildrenSpec(
        image=None,
        image_pull_secrets=(),
        service_account=ServiceAccountSpec(name=None, annotations={}),
        inherited=MetadataSpec(),
        service=ServiceSpec(type="ClusterIP", annotations={}),
    )
    assert (spec.download.resources, spec.download.ca_bundle, spec.download.env) == (None, None, ())
    assert (spec.gateway.max_queue, spec.gateway.cold_start, spec.gateway.heartbeat_s) == (256, "Hold", 10.0)
    assert (spec.rollout.wait_for_idle_s, spec.rollout.progress_deadline_s) == (60.0, None)
    assert (spec.drain.timeout_s, spec.drain.pre_stop_s) == (120.0, 15.0)
    assert (spec.expose.ingress, spec.expose.http_route, spec.expose.inference_pool) == (None, None, False)
    assert (spec.observability.service_monitor, spec.observability.alerts) == ("auto", True)
    assert (spec.resources, spec.profiles, spec.suspend, spec.pod_template) == (None, (), False, {})


def test_everything_is_read(full: LLMDeploymentSpec) -> None:
    assert full.model.token_secret_ref == SecretKeyRef(name="hf", key="token")
    assert full.engine.speculative == SpeculativeSpec(method="ngram", model=None, num_speculative_tokens=3)
    assert full.engine.env == {"A": "b"}
    assert set(full.engine.env_sources) == {"B", "C", "D"}
    assert full.engine.env_sources["C"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert full.resources == ResourcesSpec(limits={"nvidia.com/gpu": "1", "memory": "16Gi"}, requests={"cpu": "500m"})
    assert full.scaling.schedules == (
        ScheduleSpec(start="0 8 * * 1-5", end="0 18 * * 1-5", timezone="Europe/Paris", min=1, max=None),
    )
    assert full.cache.storage_class_name == "fast"
    assert full.children == ChildrenSpec(
        image="registry.example/server:1",
        image_pull_secrets=("registry",),
        service_account=ServiceAccountSpec(name=None, annotations={"example.com/role": "reader"}),
        inherited=MetadataSpec(labels={"team": "search"}, annotations={"example.com/owner": "ml"}),
        service=ServiceSpec(type="LoadBalancer", annotations={"example.com/internal": "true"}),
    )
    assert full.download == DownloadSpec(
        env=({"name": "HTTPS_PROXY", "value": "http://proxy:3128"},),
        env_from=({"prefix": "AWS_", "secretRef": {"name": "bucket", "optional": True}},),
        resources=ResourcesSpec(limits={"memory": "4Gi"}, requests={"cpu": "1"}),
        ca_bundle={"configMapKeyRef": {"name": "ca", "key": "ca.crt"}},
        service_account_name="downloader",
        metadata=MetadataSpec(labels={"sidecar.istio.io/inject": "false"}, annotations={"example.com/why": "model"}),
        image_pull_secrets=("mirror",),
        security_context={"runAsUser": 1000, "fsGroup": 1000, "seLinuxOptions": {"level": "s0:c1,c2"}},
    )
    assert full.adapters == (AdapterSpec(name="sql", uri="hf://acme/sql-lora"),)
    assert full.access.api_keys_secret == "keys"
    assert full.expose.ingress == IngressSpec(
        host="llm.example.com", class_name="nginx", tls_secret_name="tls", annotations={"a": "b"}
    )
    assert full.expose.http_route == HttpRouteSpec(
        parent_refs=(ParentRef(name="gw", namespace="infra", section_name="https"),), hostnames=("llm.example.com",)
    )
    assert full.pod_template == {"spec": {"tolerations": [{"operator": "Exists"}]}}


def _count_fields(kind: Any) -> int:
    return len(fields(kind))


def test_every_field_of_the_crd_has_a_place() -> None:
    """A new field of the CRD changes the count here, and must be read above."""
    properties = load_schema()["properties"]["spec"]["properties"]
    sections = {
        "model": spec_module.ModelSpec,
        "scaling": spec_module.ScalingSpec,
        "cache": spec_module.CacheSpec,
        "gateway": spec_module.GatewaySpec,
        "rollout": spec_module.RolloutSpec,
        "drain": spec_module.DrainSpec,
        "access": spec_module.AccessSpec,
        "expose": ExposeSpec,
        "observability": spec_module.ObservabilitySpec,
    }
    assert {name: _count_fields(kind) for name, kind in sections.items()} == {
        name: len(properties[name]["properties"]) for name in sections
    }
    assert _count_fields(spec_module.EngineSpec) == len(properties["engine"]["properties"]) + 1  # env is two
    download = properties["download"]["properties"]
    assert _count_fields(DownloadSpec) == len(download) - 1  # labels and annotations are one
    num_of_children = _count_fields(ChildrenSpec)
    # profile and profiles are one
    assert _count_fields(LLMDeploymentSpec) - 1 + num_of_children == len(properties) - 1


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"profile": "h100"}, ("h100",)),
        ({"profiles": ["spot", "h100"]}, ("spot", "h100")),
        ({"resources": {}}, ()),
    ],
)
def test_profiles_are_a_list_however_written(given: dict[str, Any], read: tuple[str, ...]) -> None:
    assert _read(given).spec.profiles == read


def test_idle_to_zero_needs_a_minimum_of_zero() -> None:
    assert _read({"scaling": {"min": 1}}).spec.scaling.idle_to_zero_after_s is None
    assert _read({"scaling": {"idleToZeroAfter": "30s"}}).spec.scaling.idle_to_zero_after_s == 30.0


def test_sizes_and_durations_become_numbers() -> None:
    spec = _read({"cache": {"size": "20Gi"}, "rollout": {"progressDeadline": "1h30m"}}).spec
    assert spec.cache.size_bytes == 20 << 30
    assert spec.rollout.progress_deadline_s == 5400.0


def test_identity_is_read() -> None:
    deployment = _read({}, namespace="team-a", uid="u-1", generation=7)
    assert (deployment.namespace, deployment.uid, deployment.generation) == ("team-a", "u-1", 7)


def test_fields_of_a_later_version_are_passed_over() -> None:
    assert _read({"someday": {"a": 1}, "engine": {"someday": 1}}) == _read({})


def test_equal_manifests_read_equal_and_other_ones_do_not() -> None:
    assert _read({"engine": {"dtype": "auto"}}) == _read({})
    assert _read({"engine": {"dtype": "float32"}}) != _read({})


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"model": {"uri": "ftp://x"}}, "spec.model.uri"),
        ({"model": {}}, "spec.model.uri"),
        ({"model": None}, "spec.model"),
        ({"adapters": [{"name": "a", "uri": "hf://a/b"}, {"name": "b", "uri": "b"}]}, "spec.adapters[1].uri"),
        ({"drain": {"timeout": "soon"}}, "spec.drain.timeout"),
        ({"rollout": {"progressDeadline": "never"}}, "spec.rollout.progressDeadline"),
        ({"scaling": {"min": "one"}}, "spec.scaling.min"),
        ({"scaling": {"targetPendingPerReplica": "many"}}, "spec.scaling.targetPendingPerReplica"),
        ({"cache": {"size": "big"}}, "spec.cache.size"),
        ({"resources": {"limits": {"cpu": "two"}}}, "spec.resources.limits[cpu]"),
        ({"download": {"resources": {"limits": {"cpu": "two"}}}}, "spec.download.resources.limits[cpu]"),
        ({"engine": {"speculative": {"method": "eagle", "model": "x"}}}, "spec.engine.speculative.model"),
    ],
)
def test_an_error_names_the_field(spec: dict[str, Any], path: str) -> None:
    with pytest.raises(SpecError) as caught:
        _read(spec)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.message}"


@pytest.mark.parametrize("metadata", [None, {}, {"name": 7}, []])
def test_a_name_is_needed(metadata: Any) -> None:
    with pytest.raises(SpecError, match=r"metadata\.name"):
        LLMDeployment.from_manifest({"metadata": metadata, "spec": {"model": {"uri": "hf://a/b"}}})


def test_every_section_is_frozen() -> None:
    kinds = [kind for kind in vars(spec_module).values() if isinstance(kind, type) and is_dataclass(kind)]
    assert len(kinds) > 15
    assert all(kind.__dataclass_params__.frozen for kind in kinds)  # type: ignore[attr-defined]
