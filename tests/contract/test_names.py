"""Names stay within what Kubernetes takes, and never change once given."""

import re

import pytest

from quire_contract import names

LONGEST = "m" * names.MAX_NAME_LENGTH
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def test_the_longest_name_leaves_room_for_every_child() -> None:
    replica_set_and_pod = "-" + "x" * 10 + "-" + "x" * 5
    horizontal_pod_autoscaler = "keda-hpa-"
    for child in (
        names.workload_name(LONGEST) + replica_set_and_pod,
        horizontal_pod_autoscaler + names.workload_name(LONGEST),
        names.service_name(LONGEST),
        names.pods_service_name(LONGEST),
    ):
        assert len(child) <= 63
        assert LABEL.fullmatch(child)


def test_shared_objects_are_named_by_model_and_revision() -> None:
    assert names.cache_pvc_name("hf://Qwen/Qwen3-8B", "main") == "quire-cache-228afd81"
    assert names.download_job_name("hf://Qwen/Qwen3-8B", "main", "claim") == "quire-download-7b1cb2c2"
    digests = {names.model_digest(uri, revision) for uri in ("hf://a", "hf://b") for revision in (None, "main", "v1")}
    assert len(digests) == 6


def test_the_digest_keeps_uri_and_revision_apart() -> None:
    assert names.model_digest("hf://ab", "c") != names.model_digest("hf://a", "bc")


def test_the_selector_is_part_of_the_labels() -> None:
    """Pods carry the common labels; a selector that asked for more would find none."""
    labels = names.common_labels("m", names.COMPONENT_SERVER)
    assert names.selector_labels("m").items() <= labels.items()
    assert dict(pair.split("=") for pair in names.selector_string("m").split(",")) == names.selector_labels("m")


@pytest.mark.parametrize("value", names.common_labels(LONGEST, names.COMPONENT_DOWNLOAD).values())
def test_label_values_are_valid(value: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)


def test_the_endpoint_is_the_service() -> None:
    assert names.endpoint("m", "team-a") == "http://m.team-a.svc/v1"
