"""Every document that the operator sends for an LLMDeployment, against `golden/`.

A case is the LLMDeployment and, where they are not the defaults, `settings:`, `cluster:`, `facts:` and `input:` (what
the plan decides).
"""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from quire_contract import names
from quire_contract.model_facts import ModelFacts
from quire_contract.model_uri import Scheme, parse_model_uri
from quire_kube.objects import Manifest
from quire_operator.plan.drift import is_applied
from quire_operator.plan.hardware import resolve_hardware
from quire_operator.plan.resources.render import render_children, render_download_job, render_volume, template_revision
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.spec.kinds import OPTIONAL_KINDS, OWNED_KINDS, ref_of
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import parse_settings
from quire_operator.spec.validation import validate_manifest
from quire_operator.watch.cluster import ClusterFacts

HERE = Path(__file__).parents[1]
CASES = sorted((HERE / "cases").glob("*.yaml"))
POD_TEMPLATES = {
    "Deployment": (("template",),),
    "Job": (("template",),),
    "LeaderWorkerSet": (("leaderWorkerTemplate", "leaderTemplate"), ("leaderWorkerTemplate", "workerTemplate")),
}


def render_case(file: Path) -> list[Manifest]:
    manifest, *extras = yaml.safe_load_all(file.read_text())
    assert validate_manifest(manifest) == ()
    extra: dict[str, Any] = {key: value for document in extras for key, value in document.items()}
    deployment = LLMDeployment.from_manifest(manifest)
    settings = parse_settings(extra.get("settings", {}))
    given = extra.get("input", {})
    uri = parse_model_uri(deployment.spec.model.uri)
    claim: str | None = names.cache_pvc_name(str(uri), deployment.spec.model.revision)
    is_ours = uri.is_downloaded and deployment.spec.cache.existing_claim is None
    if uri.scheme is Scheme.PVC:
        claim = uri.authority
    elif uri.scheme is Scheme.OCI:
        claim = None
    elif not is_ours:
        claim = deployment.spec.cache.existing_claim
    kinds = extra.get("cluster", {}).get("kinds", [])
    hardware = resolve_hardware(deployment, settings, given.get("profile"))
    children = render_children(
        RenderInput(
            deployment=deployment,
            settings=settings,
            cluster=ClusterFacts(kinds=frozenset(kind for kind in OPTIONAL_KINDS if kind.kind in kinds)),
            hardware=hardware,
            claim=claim,
            facts=msgspec.convert({"type": "ModelFacts", **extra["facts"]}, ModelFacts) if "facts" in extra else None,
            replicas=0 if deployment.spec.suspend else given.get("replicas", deployment.spec.replicas or 1),
            load_budget_s=given.get("loadBudgetSeconds", 600.0),
            target_pending_per_replica=given.get("targetPendingPerReplica", 51),
        )
    )
    shared = [render_volume(deployment, settings, given.get("sizeBytes", 16 << 30))] if is_ours else []
    if claim is not None:
        shared.append(render_download_job(deployment, settings, hardware, claim, attempt=given.get("attempt", 1)))
    return [*shared, *children]


def pod_specs(manifest: Manifest) -> list[Manifest]:
    specs = []
    for path in POD_TEMPLATES.get(manifest["kind"], ()):
        template = manifest["spec"]
        for key in path:
            template = template[key]
        specs.append(template["spec"])
    return specs


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_a_case_renders_as_its_golden_file(file: Path, is_updating_golden: bool) -> None:
    golden = HERE / "golden" / file.name
    rendered = render_case(file)
    if is_updating_golden:
        unshared = json.loads(json.dumps(rendered))  # a mapping that is used twice would become an alias
        golden.write_text(yaml.safe_dump_all(unshared, sort_keys=False, width=120, allow_unicode=True))
    assert rendered == list(yaml.safe_load_all(golden.read_text()))


def test_every_golden_file_has_a_case() -> None:
    assert [file.name for file in CASES] == sorted(file.name for file in (HERE / "golden").glob("*.yaml"))


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_what_was_sent_need_not_be_sent_again(file: Path) -> None:
    for manifest, again in zip(render_case(file), render_case(file), strict=True):
        assert is_applied(again, manifest)


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_owned_objects_have_an_owner_and_shared_ones_none(file: Path) -> None:
    (deployment, *_) = yaml.safe_load_all(file.read_text())
    for manifest in render_case(file):
        metadata = manifest["metadata"]
        assert metadata["namespace"] == deployment["metadata"]["namespace"]
        assert metadata["labels"][names.LABEL_MANAGED_BY] == names.MANAGED_BY
        owners = metadata.get("ownerReferences", [])
        if ref_of(manifest).kind in OWNED_KINDS:
            assert [owner["uid"] for owner in owners] == [deployment["metadata"]["uid"]]
            assert not owners[0]["blockOwnerDeletion"]
            assert metadata["labels"][names.LABEL_DEPLOYMENT] == deployment["metadata"]["name"]
        else:
            assert owners == []
            assert names.LABEL_DEPLOYMENT not in metadata["labels"]
            assert names.LABEL_CACHE in metadata["labels"]


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_every_pod_is_within_the_restricted_profile_and_bound_by_name(file: Path) -> None:
    for manifest in render_case(file):
        for spec in pod_specs(manifest):
            assert spec["automountServiceAccountToken"] is False
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            volumes = {volume["name"] for volume in spec["volumes"]}
            ports = []
            for container in [*spec.get("initContainers", ()), *spec["containers"]]:
                context = container["securityContext"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
                ports += [port["name"] for port in container.get("ports", ())]
            server = spec["containers"][0]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert probe not in server or server[probe]["httpGet"]["port"] in ports


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_a_workloads_pods_carry_its_revision_and_its_selector_does_not(file: Path) -> None:
    for manifest in render_case(file):
        if manifest["kind"] not in ("Deployment", "LeaderWorkerSet"):
            continue
        revision = manifest["metadata"]["labels"][names.LABEL_REVISION]
        assert revision == template_revision(manifest)
        for path in POD_TEMPLATES[manifest["kind"]]:
            template = manifest["spec"]
            for key in path:
                template = template[key]
            labels = template["metadata"]["labels"]
            assert labels[names.LABEL_REVISION] == revision
            assert names.selector_labels(manifest["metadata"]["name"]).items() <= labels.items()
        assert names.LABEL_REVISION not in manifest["spec"].get("selector", {}).get("matchLabels", {})
