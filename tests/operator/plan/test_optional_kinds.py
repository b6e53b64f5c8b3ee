"""Documents of kinds that a cluster may not have, against the fields and values that their schemas know.

From keda.sh/v1alpha1 (2.20), monitoring.coreos.com/v1 (0.80) and leaderworkerset.x-k8s.io/v1 (0.7): what of them is
used here, and nothing besides, so that a misspelt field is found without a cluster. Pod templates are judged by a real
API server, in `e2e/test_goldens_are_accepted.py`.
"""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
DURATION = {"type": "string", "pattern": "^(0|([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?)$"}


def fields(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


def items(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


POLICIES = items(
    fields(
        "type value periodSeconds",
        type=one_of("Pods", "Percent"),
        value={"type": "integer", "minimum": 1},
        periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
    )
)
DIRECTION = fields("policies", stabilizationWindowSeconds={**COUNT, "maximum": 3600}, policies=POLICIES)
TRIGGER = {
    "oneOf": [
        fields(
            "type metadata metricType",
            type={"const": "metrics-api"},
            metricType=one_of("AverageValue"),  # KEDA has no fallback for others
            metadata=fields(
                "url valueLocation targetValue",
                url=TEXT,
                format=one_of("json", "xml", "yaml", "prometheus"),
                valueLocation=TEXT,
                targetValue={"type": "string", "pattern": "^[0-9.]+$"},
                activationTargetValue={"type": "string", "pattern": "^[0-9.]+$"},
                aggregateFromKubeServiceEndpoints=one_of("true", "false"),
                aggregationType=one_of("average", "sum", "max", "min"),
            ),
        ),
        fields(
            "type metadata",
            type={"const": "cron"},
            metadata=fields(
                "timezone start end desiredReplicas", timezone=TEXT, start=TEXT, end=TEXT, desiredReplicas=TEXT
            ),
        ),
    ]
}
SPECS: dict[str, dict[str, Any]] = {
    "ScaledObject": fields(
        "scaleTargetRef triggers",
        scaleTargetRef=fields("name", apiVersion=TEXT, kind=TEXT, name=TEXT),
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        initialCooldownPeriod=COUNT,
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        fallback=fields(
            "failureThreshold replicas",
            failureThreshold=COUNT,
            replicas=COUNT,
            behavior=one_of(
                "static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower", "scalingModifiers"
            ),
        ),
        advanced=fields(
            "",
            restoreToOriginalReplicaCount={"type": "boolean"},
            horizontalPodAutoscalerConfig=fields("", behavior=fields("", scaleUp=DIRECTION, scaleDown=DIRECTION)),
        ),
        triggers=items(TRIGGER),
    ),
    "ServiceMonitor": fields(
        "endpoints selector",
        jobLabel=TEXT,
        namespaceSelector=fields("", any={"type": "boolean"}, matchNames=items(TEXT)),
        selector=fields("matchLabels", matchLabels=TEXTS),
        endpoints=items(fields("port", port=TEXT, path=TEXT, interval=DURATION)),
    ),
    "PrometheusRule": fields(
        "groups",
        groups=items(
            fields(
                "name rules",
                name=TEXT,
                rules=items(
                    fields(
                        "alert expr",
                        alert=TEXT,
                        expr=TEXT,
                        **{"for": DURATION},
                        labels=TEXTS,
                        annotations=TEXTS,
                    )
                ),
            )
        ),
    ),
    "LeaderWorkerSet": fields(
        "leaderWorkerTemplate",
        replicas=COUNT,
        startupPolicy=one_of("LeaderCreated", "LeaderReady"),
        networkConfig=fields("subdomainPolicy", subdomainPolicy=one_of("Shared", "UniquePerReplica")),
        rolloutStrategy=fields(
            "type",
            type=one_of("RollingUpdate"),
            rollingUpdateConfiguration=fields("", partition=COUNT, maxSurge=COUNT, maxUnavailable=COUNT),
        ),
        leaderWorkerTemplate=fields(
            "workerTemplate",
            size={"type": "integer", "minimum": 1},
            restartPolicy=one_of("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
            leaderTemplate={"type": "object"},
            workerTemplate={"type": "object"},
        ),
    ),
}
DOCUMENTS = [
    pytest.param(document, id=f"{file.stem}-{document['kind']}")
    for file in sorted(GOLDEN.glob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
    if document["kind"] in SPECS
]


def test_every_optional_kind_is_in_a_golden_file() -> None:
    assert {document["kind"] for parameter in DOCUMENTS for document in parameter.values} == SPECS.keys()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_has_the_fields_that_its_kind_knows(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SPECS[document["kind"]]).validate(document["spec"])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_labels_and_names_are_what_kubernetes_takes(document: dict[str, Any]) -> None:
    for key, value in document["metadata"]["labels"].items():
        assert re.fullmatch(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", key)
        assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", value)
    if document["kind"] == "LeaderWorkerSet":
        rollout = document["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
        assert rollout["maxSurge"] or rollout["maxUnavailable"]
