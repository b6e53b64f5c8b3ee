"""What a download's pods get, beyond the golden files: whose word wins, and that a changed one is carried out."""

from typing import Any

import pytest
from plan_world import JOB_NAME, World, described, downloading, manifest

from quire_kube.objects import Manifest
from quire_operator.plan.resources.download.options import download_options
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import SettingsError, parse_settings


def job_pod(download: dict[str, Any] | None, model: dict[str, Any] | None = None, **defaults: Any) -> Manifest:
    spec = {"model": {"uri": "hf://a/b", **(model or {})}, "download": download}
    world = World(manifest=manifest(spec), settings=parse_settings({"download": defaults}))
    world.settle()
    assert world.observed.job is not None
    pod: Manifest = world.observed.job["spec"]["template"]["spec"]
    return pod


def variables(pod: Manifest) -> dict[str, Any]:
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in pod["containers"][0]["env"]}


def test_a_models_variable_wins_over_the_administrators_and_both_over_ours() -> None:
    pod = job_pod(
        {"env": [{"name": "HF_ENDPOINT", "value": "https://mine"}]},
        hubEndpoint="https://hub",
        env=[{"name": "HOME", "value": "/models"}, {"name": "HF_ENDPOINT", "value": "https://theirs"}],
    )
    assert variables(pod) == {"HOME": "/models", "HF_ENDPOINT": "https://mine"}


def test_a_value_can_refer_to_an_earlier_variable() -> None:
    """Kubernetes expands `$(NAME)` of those before it in the list only."""
    env = [{"name": "USER", "value": "me"}, {"name": "HTTPS_PROXY", "value": "http://$(USER)@proxy"}]
    names = list(variables(job_pod({"env": env})))
    assert names.index("USER") < names.index("HTTPS_PROXY")


def test_a_token_given_as_a_variable_replaces_the_secrets() -> None:
    pod = job_pod({"env": [{"name": "HF_TOKEN", "value": "t"}]}, model={"tokenSecretRef": {"name": "hf"}})
    assert variables(pod)["HF_TOKEN"] == "t"


def test_sources_of_variables_add_up_the_models_last() -> None:
    """Of two sources with one key, the later wins (Container.envFrom)."""
    ours, theirs = {"secretRef": {"name": "mine"}}, {"configMapRef": {"name": "all", "optional": True}}
    assert job_pod({"envFrom": [ours]}, envFrom=[theirs])["containers"][0]["envFrom"] == [theirs, ours]


def test_resources_are_taken_whole() -> None:
    """A request of one beside a limit of the other could exceed it, which no API server takes."""
    given = {"requests": {"memory": "4Gi"}}
    assert job_pod({"resources": given})["containers"][0]["resources"] == given
    assert job_pod({"resources": {}})["containers"][0]["resources"] == {}


def test_the_laws_of_a_pod_stay_whatever_is_given() -> None:
    pod = job_pod({"serviceAccountName": "reader", "securityContext": {"runAsUser": 1000, "fsGroup": 7}})
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == "reader"
    context = pod["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["fsGroup"]) == (True, 1000, 7)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_labels_of_a_default_cannot_be_those_of_the_operator() -> None:
    spec = {"model": {"uri": "hf://a/b"}, "resources": {"limits": {"cpu": "1"}}}
    world = World(settings=parse_settings({"download": {"labels": {"app.kubernetes.io/name": "mine"}}}))
    world.settle()
    assert world.observed.job is not None
    assert world.observed.job["metadata"]["labels"]["app.kubernetes.io/name"] == "quire"
    plain = LLMDeployment.from_manifest({"metadata": {"name": "m"}, "spec": spec})
    assert download_options(plain, parse_settings({})).ca_volume is None


def test_another_variable_makes_a_running_download_anew() -> None:
    world = downloading({"download": {"env": [{"name": "HTTPS_PROXY", "value": "http://wrong"}]}})
    world.add_job_pod("Running")
    assert world.plan().actions == ()
    world.set_spec(download={"env": [{"name": "HTTPS_PROXY", "value": "http://right"}]})
    assert described(world.plan().actions) == [f"Delete Job/{JOB_NAME}"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"envFromSecret": "s"}, "envFromSecret"),
        ({"caBundle": {"configMapKeyRef": "ca"}}, "caBundle"),
        ({"env": [["A", "b"]]}, "env"),
    ],
)
def test_a_setting_that_is_none_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        parse_settings({"download": given})
