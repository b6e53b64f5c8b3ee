"""What Prometheus reads, parsed as Prometheus does."""

from prometheus_client.parser import text_string_to_metric_families

from quire_operator.process.metrics import Metrics, Readings


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_counts() -> None:
    metrics = Metrics(Readings)
    metrics.count_reconcile("ok", 0.02)
    metrics.count_reconcile("ok", 0.2)
    metrics.count_reconcile("ConflictError", 0.2)
    metrics.count_api_call("apply", "services", 200)
    metrics.count_api_call("apply", "services", 409)
    found = samples(metrics)
    assert found["quire_operator_reconciles_total", (("result", "ok"),)] == 2
    assert found["quire_operator_reconciles_total", (("result", "ConflictError"),)] == 1
    assert found["quire_operator_reconcile_seconds_count", ()] == 3
    assert found["quire_operator_reconcile_seconds_bucket", (("le", "0.025"),)] == 1
    labels = (("code", "409"), ("kind", "services"), ("verb", "apply"))
    assert found["quire_operator_api_calls_total", labels] == 1


def test_readings_are_looked_up_at_each_scrape() -> None:
    readings = Readings()
    metrics = Metrics(lambda: readings)
    assert samples(metrics)["quire_operator_leader", ()] == 0
    readings = Readings(
        is_leader=True,
        queue_depth=3,
        queue_age_s=1.5,
        watch_ages_s=(("pods", 4.0), ("pods", 9.0), ("jobs", 1.0)),
        phases=("Ready", "Ready", "Pending"),
    )
    found = samples(metrics)
    assert found["quire_operator_leader", ()] == 1
    assert found["quire_operator_queue_depth", ()] == 3
    assert found["quire_operator_queue_oldest_seconds", ()] == 1.5
    assert found["quire_operator_watch_age_seconds", (("kind", "pods"),)] == 9.0
    assert found["quire_operator_llmdeployments", (("phase", "Ready"),)] == 2
