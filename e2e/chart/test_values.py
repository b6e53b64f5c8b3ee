"""What `helm install` refuses, by the name of the value; and that every value has a description."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

CHART = Path(__file__).resolve().parents[2] / "charts" / "quire"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("nonsense=1", "nonsense"),
        ("operator.replica=3", "/operator"),
        ("operator.replicas=0", "/operator/replicas"),
        ("operator.replicas=two", "/operator/replicas"),
        ("operator.resources.limit.cpu=1", "/operator/resources"),
        ("operator.resources.limits.memory=64MB", "/operator/resources/limits/memory"),
        ("operator.tolerations[0].effekt=NoSchedule", "/operator/tolerations/0"),
        ("operator.affinity.podAffinities.x=1", "/operator/affinity"),
        ("operator.extraEnv[0].value=x", "/operator/extraEnv/0"),
        ("rbac.scope=Cluster", "/rbac/scope"),
        ("crds.install=false", "/crds"),
        ("namespaces[0]=Team_A", "/namespaces/0"),
        ("images.pullPolicy=Sometimes", "/images/pullPolicy"),
        ("images.operator.repository=quire/operator:v1", "/images/operator/repository"),
        ("images.operator.digest=sha256:abc", "/images/operator/digest"),
        ("images.tag=a/b", "/images/tag"),
        ("images.serverGpu.repository=x", "/images"),
        ("profiles.h100.gpu=1", "/profiles/h100"),
        ("profiles.H100.memory=80Gi", "H100"),
        ("profiles.h100.memory=80GB", "/profiles/h100/memory"),
        ("profiles.h100.fallbackAfter=soon", "/profiles/h100/fallbackAfter"),
        ("models.gpuMemory=80GB", "/models/gpuMemory"),
        ("models.accelerators.x.device=rocm", "/models/accelerators/x"),
        ("openshift=maybe", "/openshift"),
        ("models.imageVolumes=maybe", "/models/imageVolumes"),
        ("download.hubEndpoint=hub.example.com", "/download/hubEndpoint"),
        ("download.envFromSecret=buckets", "/download"),
        ("download.env[0].value=x", "/download/env/0"),
        ("download.envFrom[0].prefix=AWS_", "/download/envFrom/0"),
        ("download.caBundle.configMapKeyRef.name=ca", "/download/caBundle"),
        ("download.securityContext.runAsUser=0", "/download/securityContext/runAsUser"),
        ("download.securityContext.privileged=true", "/download/securityContext"),
        ("podSecurity.runAsUser=0", "/podSecurity/runAsUser"),
        ("gateway.models[0].name=a", "/gateway/models/0"),
        ("gateway.service.port=0", "/gateway/service/port"),
        ("gateway.service.type=ExternalName", "/gateway/service/type"),
        ("monitoring.podMonitor.interval=30", "/monitoring/podMonitor/interval"),
        ("monitoring.dashboards.enabled=true", "/monitoring"),
    ],
)
def test_a_wrong_value_is_refused_by_name(rendering: ModuleType, wrong: str, named: str) -> None:
    with pytest.raises(rendering.HelmError) as caught:
        rendering.render("--set", wrong)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "backend", ["https://one", "http://one/v1", "http://me@one", "one:80"], ids=["https", "path", "user", "no-scheme"]
)
def test_a_gateways_backend_is_refused_as_the_gateway_would(
    rendering: ModuleType, tmp_path: Path, backend: str
) -> None:
    values = tmp_path / "values.yaml"
    model = {"name": "tiny", "namespace": "default", "backends": [backend]}
    values.write_text(yaml.safe_dump({"gateway": {"enabled": True, "models": [model]}}))
    with pytest.raises(rendering.HelmError, match="/gateway/models/0/backends/0"):
        rendering.render("--values", values)


def test_an_old_kubernetes_is_refused(rendering: ModuleType) -> None:
    with pytest.raises(rendering.HelmError, match=r"1\.30"):
        rendering.render("--kube-version", "1.29.0")


def leaves(value: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not isinstance(value, dict) or not value or path[-1:] in (("resources",), ("labels",)):
        return {path}
    return {leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))}


def test_every_value_is_described(rendering: ModuleType) -> None:
    values = CHART / "values.yaml"
    described = {path for path, _ in rendering.described_values(values)}
    assert described == leaves(yaml.safe_load(values.read_text()))


def test_what_make_chart_writes_is_written(rendering: ModuleType) -> None:
    old = [path for path, text in rendering.build_outputs().items() if path.read_text() != text]
    assert not old, "run `make chart`, read the difference, and commit it"


def test_a_packaged_chart_renders_the_same(rendering: ModuleType, tmp_path: Path) -> None:
    said = rendering.helm("package", CHART, "--destination", tmp_path)
    archive = Path(re.search(r"saved it to: (\S+)", said)[1])  # type: ignore[index]
    assert rendering.render(chart=archive) == rendering.render()
