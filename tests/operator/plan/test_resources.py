"""What the golden files do not show: what rolls out and what does not, bounds, refusals, and what alerts ask for."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from quire_contract import metrics, names
from quire_contract.model_facts import ModelFacts
from quire_kube.objects import Manifest
from quire_operator.plan.drift import is_applied
from quire_operator.plan.hardware import Hardware, resolve_hardware
from quire_operator.plan.resources.render import render_children, render_download_job, render_volume, template_revision
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.spec.kinds import OPTIONAL_KINDS, OWNED_KINDS, ref_of
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_operator.spec.settings import Settings, parse_settings
from quire_operator.spec.validation import load_documents
from quire_operator.watch.cluster import ClusterFacts

GPU = {"limits": {"nvidia.com/gpu": 1}}
ALL_KINDS = frozenset(OPTIONAL_KINDS)
HARDWARE = Hardware(limits={}, requests={}, image="i", num_gpus=0)
EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "examples").glob("*.yaml"))


def deployment(spec: dict[str, Any] | None = None, name: str = "m") -> LLMDeployment:
    defaults = {"model": {"uri": "hf://a/b"}, "resources": GPU}
    return LLMDeployment.from_manifest({"metadata": {"name": name, "uid": "u"}, "spec": {**defaults, **(spec or {})}})


def render_input(
    spec: dict[str, Any] | None = None, settings: dict[str, Any] | None = None, **fields: Any
) -> RenderInput:
    wanted, parsed = deployment(spec), parse_settings(settings or {})
    defaults: dict[str, Any] = {
        "cluster": ClusterFacts(),
        "hardware": resolve_hardware(wanted, parsed, None),
        "claim": "claim",
        "facts": ModelFacts(path="model", bytes=8 << 30),
        "replicas": 1,
        "load_budget_s": 600.0,
        "target_pending_per_replica": 51,
    }
    return RenderInput(deployment=wanted, settings=parsed, **{**defaults, **fields})


def child(given: RenderInput, kind: str, name: str = "m") -> Manifest:
    (found,) = (c for c in render_children(given) if c["kind"] == kind and c["metadata"]["name"] == name)
    return found


def server(given: RenderInput) -> Manifest:
    container: Manifest = child(given, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return container


def revision(spec: dict[str, Any] | None = None, **fields: Any) -> str:
    return template_revision(child(render_input(spec, **fields), "Deployment"))


@pytest.mark.parametrize(
    "spec",
    [
        {"replicas": 3, "scaling": {"max": 5, "scaleDownDelay": "1m"}},
        {"gateway": {"maxQueue": 7}},
        {"cache": {"size": "99Gi", "retain": False}},
        {"rollout": {"strategy": "Replace", "waitForIdle": "5s", "progressDeadline": "2h"}},
        {"access": {"networkPolicy": "Open"}},
        {"observability": {"serviceMonitor": "never", "alerts": False}},
        {"model": {"uri": "hf://a/b", "tokenSecretRef": {"name": "t"}}},
        {"service": {"type": "LoadBalancer", "annotations": {"a": "b"}}},
        {"serviceAccount": {"annotations": {"a": "b"}}},
        {"download": {"env": [{"name": "A", "value": "1"}], "serviceAccountName": "reader", "labels": {"a": "b"}}},
    ],
)
def test_what_the_pods_do_not_see_rolls_nothing_out(spec: dict[str, Any]) -> None:
    assert revision(spec, cluster=ClusterFacts(kinds=ALL_KINDS)) == revision()


@pytest.mark.parametrize(
    "spec",
    [
        {"engine": {"maxModelLen": 1024}},
        {"engine": {"extraArgs": ["--seed", "7"]}},
        {"engine": {"env": [{"name": "A", "value": "1"}]}},
        {"model": {"uri": "hf://a/b", "servedNames": ["x"]}},
        {"resources": {"limits": {"nvidia.com/gpu": 1, "memory": "1Gi"}}},
        {"drain": {"timeout": "1s"}},
        {"drain": {"preStop": "1s"}},
        {"podTemplate": {"spec": {"nodeSelector": {"a": "b"}}}},
        {"image": "registry.example/server:1"},
        {"imagePullSecrets": [{"name": "registry"}]},
        {"serviceAccount": {"name": "mine"}},
        {"inheritedMetadata": {"labels": {"team": "search"}}},
    ],
)
def test_what_the_pods_see_rolls_out(spec: dict[str, Any]) -> None:
    assert revision(spec) != revision()


def test_another_commit_rolls_out_and_a_learned_budget_does_not() -> None:
    assert revision(facts=ModelFacts(path="model-2", bytes=8 << 30)) != revision()
    assert revision(load_budget_s=5000.0) == revision()
    short, long = (child(render_input(load_budget_s=s), "Deployment") for s in (600.0, 5000.0))
    assert not is_applied(long, short)
    assert long["metadata"]["annotations"][names.ANNOTATION_LOAD_BUDGET] == "5000"
    assert long["spec"]["progressDeadlineSeconds"] == 5600


@pytest.mark.parametrize(("size_bytes", "period_s"), [(1 << 30, 1), (8 << 30, 5)])
@pytest.mark.parametrize("budget_s", [0.5, 600.0, 601.0])
def test_the_startup_probe_alone_waits_for_the_load_and_waits_long_enough(
    size_bytes: int, period_s: int, budget_s: float
) -> None:
    given = render_input(load_budget_s=budget_s, facts=ModelFacts(path="m", bytes=size_bytes))
    startup = server(given)["startupProbe"]
    assert startup["periodSeconds"] == period_s
    assert budget_s <= period_s * startup["failureThreshold"] < budget_s + period_s
    assert all("initialDelaySeconds" not in server(given)[f"{probe}Probe"] for probe in ("startup", "liveness"))
    assert server(given)["livenessProbe"]["httpGet"]["path"] != startup["httpGet"]["path"]


@pytest.mark.parametrize(
    ("drain", "grace_s", "has_hook"),
    [
        ({}, 145, True),
        ({"timeout": "1500ms", "preStop": "0s"}, 12, False),
        ({"timeout": "0s", "preStop": "1ms"}, 11, True),
    ],
)
def test_a_pod_has_time_for_its_hook_and_its_drain(drain: dict[str, str], grace_s: int, has_hook: bool) -> None:
    given = render_input({"drain": drain})
    template = child(given, "Deployment")["spec"]["template"]
    assert template["spec"]["terminationGracePeriodSeconds"] == grace_s
    assert ("lifecycle" in server(given)) is has_hook


@pytest.mark.parametrize(("cpu", "threads"), [("4", "4"), ("2500m", "2"), ("500m", "1"), (None, None)])
def test_threads_are_the_whole_cpus_of_the_limit(cpu: str | None, threads: str | None) -> None:
    limits = {"memory": "1Gi", **({"cpu": cpu} if cpu else {})}
    env = {item["name"]: item.get("value") for item in server(render_input({"resources": {"limits": limits}}))["env"]}
    assert env.get("OMP_NUM_THREADS") == threads


def test_a_gpu_pod_is_not_told_how_many_threads() -> None:
    given = render_input({"resources": {"limits": {"nvidia.com/gpu": 1, "cpu": 4}}})
    assert "OMP_NUM_THREADS" not in {item["name"] for item in server(given)["env"]}


def test_the_users_variables_win_and_sources_come_before_what_may_refer_to_them() -> None:
    source = {"fieldRef": {"fieldPath": "status.podIP"}}
    env = [
        {"name": "URL", "value": "http://$(IP)"},
        {"name": "HOME", "value": "/x"},
        {"name": "IP", "valueFrom": source},
    ]
    rendered = server(render_input({"engine": {"env": env}}))["env"]
    assert [item["name"] for item in rendered[-3:]] == ["IP", "URL", "HOME"]
    assert [item["value"] for item in rendered if item["name"] == "HOME"] == ["/x"]


@pytest.mark.parametrize("sources", [[], [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]])
def test_the_order_of_variables_rolls_out_only_where_it_may_mean_something(sources: list[dict[str, Any]]) -> None:
    env = [{"name": "B", "value": "1"}, {"name": "A", "value": "2"}, *sources]
    assert revision({"engine": {"env": env}}) == revision({"engine": {"env": env[::-1]}})
    env[1]["value"] = "$(B)"
    assert [item["name"] for item in server(render_input({"engine": {"env": env}}))["env"]][-2:] == ["B", "A"]


def pod(given: RenderInput) -> Manifest:
    template: Manifest = child(given, "Deployment")["spec"]["template"]
    return template


@pytest.mark.parametrize(
    ("cache", "access_modes", "is_on_one_node"),
    [
        ({}, (), True),
        ({}, ("ReadWriteOnce",), True),
        ({"accessMode": "ReadWriteOncePod"}, (), True),
        ({"accessMode": "ReadWriteMany"}, (), False),
        ({"accessMode": "ReadWriteMany"}, ("ReadWriteOnce",), True),
        ({"existingClaim": "c"}, ("ReadWriteOnce", "ReadOnlyMany"), False),
        ({"existingClaim": "c"}, ("ReadWriteMany",), False),
    ],
)
def test_pods_stay_where_their_volume_can_be_attached(
    cache: dict[str, Any], access_modes: tuple[str, ...], is_on_one_node: bool
) -> None:
    template = pod(render_input({"cache": cache}, access_modes=access_modes))
    assert ("affinity" in template["spec"]) is is_on_one_node
    assert ("topologySpreadConstraints" in template["spec"]) is not is_on_one_node


def test_the_pods_of_one_claim_find_one_another_whatever_they_serve() -> None:
    one, other = pod(render_input()), pod(render_input({"model": {"uri": "hf://c/d"}}))
    (term,) = one["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    for template in (one, other):  # and the first pod of all may go anywhere, because it matches itself
        assert term["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    elsewhere = pod(render_input(claim="c" * 253))
    assert not term["labelSelector"]["matchLabels"].items() <= elsewhere["metadata"]["labels"].items()
    image = pod(render_input({"model": {"uri": "oci://r/m:1"}}, claim=None, facts=None))
    assert "topologySpreadConstraints" in image["spec"]
    assert names.LABEL_CLAIM not in image["metadata"]["labels"]


def test_no_pod_sees_the_token_and_the_job_does() -> None:
    spec = {"model": {"uri": "hf://a/b", "tokenSecretRef": {"name": "very-secret"}}}
    assert "very-secret" not in repr(render_children(render_input(spec)))
    assert "very-secret" in repr(render_download_job(deployment(spec), Settings(), HARDWARE, "claim"))


SERVER_PATH = "spec.podTemplate.spec.containers[server]"


def users_server(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "server", **fields}]}}


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ({"containers": []}, "spec.podTemplate.containers"),
        ({"metadata": {"labels": {names.LABEL_DEPLOYMENT: "other"}}}, "spec.podTemplate.metadata.labels[quire.dev/dep"),
        ({"metadata": {"labels": {names.LABEL_CLAIM: "1"}}}, "spec.podTemplate.metadata.labels[quire.dev/claim"),
        ({"metadata": {"labels": {names.LABEL_REVISION: "1"}}}, "spec.podTemplate.metadata.labels[quire.dev/rev"),
        ({"metadata": {"labels": {"$patch": "replace"}}}, "spec.podTemplate.metadata.labels[app"),
        ({"metadata": None}, "spec.podTemplate.metadata.labels[app"),
        ({"spec": {"containers": [{"name": "server", "$patch": "delete"}]}}, "spec.podTemplate.spec.containers"),
        ({"spec": {"containers": {}}}, "spec.podTemplate.spec.containers"),
        ({"spec": None}, "spec.podTemplate.spec.containers"),
        (users_server(ports=[{"containerPort": 8000, "name": "web"}]), f"{SERVER_PATH}.ports"),
        (users_server(ports=[{"$patch": "replace"}, {"containerPort": 9000, "name": "http"}]), f"{SERVER_PATH}.ports"),
        (users_server(ports=None), f"{SERVER_PATH}.ports"),
        (users_server(readinessProbe=None), f"{SERVER_PATH}.readinessProbe"),
    ],
)
def test_a_pod_template_that_would_lose_the_pods_is_refused(template: dict[str, Any], path: str) -> None:
    with pytest.raises(SpecError) as caught:
        render_children(render_input({"podTemplate": template}))
    assert caught.value.path.startswith(path)


def test_optional_kinds_are_made_only_where_the_cluster_has_them() -> None:
    settings = {"routesThroughGateway": True}
    kinds = {ref_of(c).kind for c in render_children(render_input(settings=settings))}
    assert not kinds & ALL_KINDS
    kinds = {
        ref_of(c).kind for c in render_children(render_input(settings=settings, cluster=ClusterFacts(kinds=ALL_KINDS)))
    }
    assert kinds == set(OWNED_KINDS) - {kind for kind in ALL_KINDS if kind.kind == "LeaderWorkerSet"}


@pytest.mark.parametrize(
    ("spec", "settings", "missing"),
    [
        ({"observability": {"serviceMonitor": "never"}}, {"routesThroughGateway": True}, "ServiceMonitor"),
        ({"observability": {"alerts": False}}, {"routesThroughGateway": True}, "PrometheusRule"),
        ({"scaling": {"mode": "Off"}}, {"routesThroughGateway": True}, "ScaledObject"),
        ({"scaling": {"mode": "Builtin"}}, {"routesThroughGateway": True}, "ScaledObject"),
        ({}, {"routesThroughGateway": False}, "ScaledObject"),
        ({"access": {"networkPolicy": "Open"}}, {"routesThroughGateway": True}, "NetworkPolicy"),
    ],
)
def test_what_is_not_wanted_is_not_made(spec: dict[str, Any], settings: dict[str, Any], missing: str) -> None:
    children = render_children(render_input(spec, settings, cluster=ClusterFacts(kinds=ALL_KINDS)))
    optional = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "NetworkPolicy"}
    assert {c["kind"] for c in children} & optional == optional - {missing}


def test_the_leader_of_several_pods_alone_is_routed_to_and_they_may_talk() -> None:
    given = render_input({"engine": {"pipelineParallelSize": 2}})
    for name in ("m", "m-pods"):
        assert child(given, "Service", name)["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    template = child(given, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    (worker,) = template["workerTemplate"]["spec"]["containers"]
    assert not {"ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle"} & worker.keys()
    assert worker["args"][-1] == "--headless"
    policy = child(given, "NetworkPolicy")["spec"]
    peers = [{"podSelector": {"matchLabels": names.selector_labels("m")}}]
    assert {"from": peers} in policy["ingress"]
    assert {"to": peers} in policy["egress"]


@pytest.mark.parametrize(("budget_s", "delay"), [(600.0, "5m"), (100_000.0, "20h"), (0.0, "0s")])
def test_kedas_autoscaler_is_within_what_kubernetes_takes(budget_s: float, delay: str) -> None:
    given = render_input(
        {"scaling": {"scaleDownDelay": delay}},
        {"routesThroughGateway": True},
        cluster=ClusterFacts(kinds=ALL_KINDS),
        load_budget_s=budget_s,
    )
    behavior = child(given, "ScaledObject")["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    for direction in behavior.values():
        assert 0 <= direction["stabilizationWindowSeconds"] <= 3600
        assert all(0 < policy["periodSeconds"] <= 1800 for policy in direction["policies"])


@pytest.mark.parametrize("spec", [{}, {"engine": {"tensorParallelSize": 2}}])
def test_alerts_ask_for_series_that_exist_and_for_this_models_pods_only(spec: dict[str, Any]) -> None:
    rule = child(render_input(spec, cluster=ClusterFacts(kinds=ALL_KINDS)), "PrometheusRule")
    (rules,) = (group["rules"] for group in rule["spec"]["groups"])
    ours = {metric.name for metric in metrics.SERVER_METRICS}
    for alert in rules:
        for series in re.findall(r"\b([a-z_]+:?[a-z_]+)\{", alert["expr"]):
            assert series in ours or series.startswith(("kube_pod_", "kube_deployment_", "kube_statefulset_"))
        assert alert["expr"].count("(") == alert["expr"].count(")")
        assert alert["annotations"]["runbook"]
    patterns = {pattern for alert in rules for pattern in re.findall(r'pod=~"([^"]+)"', alert["expr"])}
    (pattern,) = patterns
    pods = ["m-7d9f8c6b5-x2k4z"] if not spec else ["m-0", "m-1-1"]
    assert all(re.fullmatch(pattern, pod) for pod in pods)
    assert not any(re.fullmatch(pattern, pod) for pod in ("m-big-7d9f8c6b5-x2k4z", "n-7d9f8c6b5-x2k4z", "m-big-0"))


def test_a_job_is_told_apart_by_what_it_does_and_not_by_its_attempt() -> None:
    first, third = (render_download_job(deployment(), Settings(), HARDWARE, "claim", attempt=num) for num in (1, 3))
    assert third["metadata"]["annotations"][names.ANNOTATION_ATTEMPT] == "3"
    hashes = [job["metadata"]["annotations"][names.ANNOTATION_APPLIED_HASH] for job in (first, third)]
    assert hashes[0] == hashes[1]
    with_token = deployment({"model": {"uri": "hf://a/b", "tokenSecretRef": {"name": "t"}}})
    changed = render_download_job(with_token, Settings(), HARDWARE, "claim")
    assert changed["metadata"]["annotations"][names.ANNOTATION_APPLIED_HASH] != hashes[0]


def test_two_deployments_of_a_model_render_one_volume_and_one_job() -> None:
    one, two = deployment(name="one"), deployment({"engine": {"maxNumSeqs": 8}}, name="two")
    assert render_volume(one, Settings(), 1 << 30) == render_volume(two, Settings(), 1 << 30)
    jobs = [render_download_job(llm, Settings(), HARDWARE, "c") for llm in (one, two)]
    assert jobs[0] == jobs[1]


@pytest.mark.parametrize(("size_bytes", "text"), [(16 << 30, "16Gi"), (1500, "1500"), ((1 << 30) + 1, "1073741825")])
def test_a_volume_has_the_size_that_was_asked_for(size_bytes: int, text: str) -> None:
    volume = render_volume(deployment(), Settings(), size_bytes)
    assert volume["spec"]["resources"]["requests"]["storage"] == text


def test_rendering_changes_nothing_that_it_was_given() -> None:
    template = {
        "spec": {"containers": [{"name": "server", "env": [{"name": "A", "value": "1"}]}], "nodeSelector": None}
    }
    given = render_input({"podTemplate": copy.deepcopy(template)})
    assert render_children(given) == render_children(given)
    assert given.deployment.spec.pod_template == template


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_can_be_rendered(file: Path) -> None:
    (document,) = load_documents(file)
    wanted, settings = LLMDeployment.from_manifest(document), Settings()
    given = RenderInput(
        deployment=wanted,
        settings=settings,
        cluster=ClusterFacts(kinds=ALL_KINDS),
        hardware=resolve_hardware(wanted, settings, None),
        claim="claim",
        facts=ModelFacts(path="model", bytes=1),
        replicas=1,
        load_budget_s=600.0,
        target_pending_per_replica=1,
    )
    assert child(given, "Deployment", wanted.name)
