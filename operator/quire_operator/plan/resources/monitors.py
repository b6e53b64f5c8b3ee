"""What Prometheus is told: where to scrape a model, and when to wake somebody.

Alerts carry a runbook as text, because a cluster without access to the web needs it most. Series of the server are
those of `quire_contract.metrics`; the others are kube-state-metrics'.
"""

from typing import Final

from quire_contract import metrics, names, paths
from quire_kube.objects import Manifest
from quire_operator.plan.hardware import CONTAINER, pods_per_replica
from quire_operator.plan.resources.child import build_child, whole_seconds
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.plan.resources.services import HTTP_PORT_NAME
from quire_operator.spec.kinds import PROMETHEUS_RULE, SERVICE_MONITOR

_SCRAPE_INTERVAL: Final = "15s"


def build_service_monitor(given: RenderInput) -> Manifest | None:
    """Build the ServiceMonitor; None where it is not wanted or the cluster does not know the kind."""
    if given.deployment.spec.observability.service_monitor == "never" or not given.cluster.has(SERVICE_MONITOR):
        return None
    return build_child(
        given,
        SERVICE_MONITOR,
        names.workload_name(given.deployment.name),
        spec={
            "jobLabel": names.LABEL_DEPLOYMENT,
            "namespaceSelector": {"matchNames": [given.deployment.namespace]},
            # The headless Service alone has this component, so no pod is scraped twice.
            "selector": {"matchLabels": names.selector_labels(given.deployment.name)},
            "endpoints": [{"port": HTTP_PORT_NAME, "path": paths.METRICS, "interval": _SCRAPE_INTERVAL}],
        },
    )


def build_prometheus_rule(given: RenderInput) -> Manifest | None:
    """Build the PrometheusRule; None where it is not wanted or the cluster does not know the kind."""
    if not given.deployment.spec.observability.alerts or not given.cluster.has(PROMETHEUS_RULE):
        return None
    name = given.deployment.name
    rules = [
        _model_down(given),
        _cold_start_over_budget(given),
        _crash_loop(given),
        _queue_saturated(given),
        _kv_cache_thrashing(given),
    ]
    return build_child(
        given,
        PROMETHEUS_RULE,
        names.workload_name(name),
        spec={"groups": [{"name": f"quire.{given.deployment.namespace}.{name}", "rules": rules}]},
    )


def _model_down(given: RenderInput) -> Manifest:
    if _is_several(given):
        chosen = _select(given, statefulset=given.deployment.name)
        wanted, ready = f"kube_statefulset_replicas{chosen}", f"kube_statefulset_status_replicas_ready{chosen}"
    else:
        chosen = _select(given, deployment=given.deployment.name)
        wanted, ready = f"kube_deployment_spec_replicas{chosen}", f"kube_deployment_status_replicas_ready{chosen}"
    budget_s = whole_seconds(given.load_budget_s)
    return _alert(
        given,
        "QuireModelDown",
        expr=f"sum({wanted}) > 0 and sum({ready}) == 0",
        for_s=max(budget_s, 300),
        severity="critical",
        summary="has no ready replica, although it should have",
        runbook=f"Nothing answers, and a start should have ended after {budget_s} s. `{_get(given)}` says why (REASON);"
        " `kubectl describe llm` has the conditions, and the events of pods, volume and download.",
    )


def _cold_start_over_budget(given: RenderInput) -> Manifest:
    pods = _select(given, pod=f"~{_pod_pattern(given)}")
    ready = _select(given, pod=f"~{_pod_pattern(given)}", condition="true")
    budget_s = whole_seconds(given.load_budget_s)
    return _alert(
        given,
        "QuireColdStartOverBudget",
        expr=f"(time() - kube_pod_start_time{pods}) > {budget_s}"
        f" and on (namespace, pod) kube_pod_status_ready{ready} == 0",
        for_s=60,
        severity="warning",
        summary="has a pod ({{ $labels.pod }}) that is not ready after its load budget",
        runbook=f"The budget is {budget_s} s, from past starts and the size of the model. Compare"
        " status.coldStart.stages with earlier starts: a slow `pull` points at the registry, a slow `load` at the"
        " volume, a slow `schedule` at missing nodes.",
    )


def _crash_loop(given: RenderInput) -> Manifest:
    chosen = _select(given, pod=f"~{_pod_pattern(given)}", container=CONTAINER)
    return _alert(
        given,
        "QuireCrashLoop",
        expr=f"increase(kube_pod_container_status_restarts_total{chosen}[15m]) >= 3",
        for_s=0,
        severity="critical",
        summary="has a pod ({{ $labels.pod }}) whose server ends again and again",
        runbook=f"`{_get(given)}` names the cause that the server left behind. OutOfMemory: raise"
        " resources.limits.memory, or lower engine.maxModelLen or engine.maxNumSeqs. If it began with a change of the"
        " spec, revert that; the old pods go on serving meanwhile.",
    )


def _queue_saturated(given: RenderInput) -> Manifest:
    series = f"{metrics.NUM_REQUESTS_WAITING.name}{_select(given, service=_pods_service(given))}"
    limit = given.target_pending_per_replica
    return _alert(
        given,
        "QuireQueueSaturated",
        expr=f"avg({series}) > {limit}",
        for_s=600,
        severity="warning",
        summary="has {{ $value | humanize }} requests waiting per replica",
        runbook=f"More than {limit} requests have waited at each replica for ten minutes: clients wait longer than the"
        " model computes. Raise scaling.max (or replicas); condition AutoscalingActive says whether scaling works.",
    )


def _kv_cache_thrashing(given: RenderInput) -> Manifest:
    chosen = _select(given, service=_pods_service(given))
    preemptions = f"sum by (pod) (rate({metrics.NUM_PREEMPTIONS.name}{chosen}[5m]))"
    usage = f"max by (pod) ({metrics.KV_CACHE_USAGE_PERC.name}{chosen})"
    return _alert(
        given,
        "QuireKVCacheThrashing",
        expr=f"{preemptions} > 0.1 and on (pod) {usage} > 0.9",
        for_s=600,
        severity="warning",
        summary="computes requests again ({{ $value | humanize }} preemptions per second in {{ $labels.pod }})",
        runbook="The KV cache is full, so requests are taken out and computed a second time. Lower engine.maxNumSeqs or"
        " engine.maxModelLen, give more memory (status.fit says what there is), or add replicas.",
    )


def _alert(
    given: RenderInput, name: str, *, expr: str, for_s: int, severity: str, summary: str, runbook: str
) -> Manifest:
    deployment = given.deployment
    labels = {"severity": severity, "namespace": deployment.namespace, "llmdeployment": deployment.name}
    annotations = {"summary": f"{deployment.namespace}/{deployment.name} {summary}", "runbook": runbook}
    alert = {"alert": name, "expr": expr, "labels": labels, "annotations": annotations}
    return {**alert, "for": f"{for_s}s"} if for_s else alert


def _select(given: RenderInput, **matchers: str) -> str:
    """Return a selector of series in the namespace; a value that starts with `~` is a pattern."""
    shown = [f'namespace="{given.deployment.namespace}"']
    for label, value in matchers.items():
        shown.append(f'{label}=~"{value[1:]}"' if value.startswith("~") else f'{label}="{value}"')
    return "{" + ",".join(shown) + "}"


def _pod_pattern(given: RenderInput) -> str:
    """Return a pattern of the pods' names that takes in no pod of a model whose name begins alike."""
    ends = "-[0-9]+(-[0-9]+)?" if _is_several(given) else "-[a-z0-9]+-[a-z0-9]{5}"
    return names.workload_name(given.deployment.name) + ends


def _is_several(given: RenderInput) -> bool:
    return pods_per_replica(given.deployment, given.hardware) > 1


def _pods_service(given: RenderInput) -> str:
    return names.pods_service_name(given.deployment.name)


def _get(given: RenderInput) -> str:
    return f"kubectl get llm {given.deployment.name} -n {given.deployment.namespace}"
