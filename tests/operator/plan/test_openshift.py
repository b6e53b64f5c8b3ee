"""Pods where the platform assigns users. The judge is OpenShift's SecurityContextConstraints `restricted-v2`.

Of `restricted-v2`: runAsUser MustRunAsRange and fsGroup MustRunAs, both from the namespace's annotation, so that a pod
that names no id is given one and a pod that names another is refused; seccompProfiles runtime/default;
allowPrivilegeEscalation false; capabilities drop ALL, add at most NET_BIND_SERVICE; volumes configMap, csi,
downwardAPI, emptyDir, ephemeral, persistentVolumeClaim, projected, secret.
"""

from typing import Any

import pytest
from plan_world import CLUSTER, World, manifest

from quire_kube.objects import Manifest
from quire_operator.spec.settings import Settings, parse_settings
from quire_operator.watch.cluster import ClusterFacts

NAMESPACE_IDS = range(1_000_680_000, 1_000_690_000)
VOLUMES = {
    *("name", "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"),
    "secret",
}
OPENSHIFT = ClusterFacts(has_default_storage_class=True, is_openshift=True)


def refusals(pod: Manifest) -> list[str]:
    """Return why restricted-v2 does not admit a pod."""
    found = []
    contexts = [pod.get("securityContext") or {}, *(c.get("securityContext") or {} for c in pod["containers"])]
    for context in contexts:
        for field in ("runAsUser", "fsGroup"):
            if context.get(field) is not None and context[field] not in NAMESPACE_IDS:
                found.append(f"{field}: {context[field]} is not in the namespace's range")
        if context.get("seccompProfile", {"type": "RuntimeDefault"}) != {"type": "RuntimeDefault"}:
            found.append("seccomp may not be chosen")
    for container in contexts[1:]:
        if container.get("allowPrivilegeEscalation") is not False:
            found.append("allowPrivilegeEscalation")
        if container.get("capabilities") != {"drop": ["ALL"]}:
            found.append("capabilities")
    found += [f"volume {key}" for volume in pod["volumes"] for key in volume if key not in VOLUMES]
    return found


def pods(cluster: ClusterFacts, settings: Settings | None = None, **spec: Any) -> list[Manifest]:
    """Return the download's pod and a serving pod."""
    world = World(manifest=manifest(spec), cluster=cluster, settings=settings or Settings())
    world.step()
    assert world.observed.job is not None
    download = world.observed.job["spec"]["template"]["spec"]
    world.download()
    return [download, world.workload()["spec"]["template"]["spec"]]


def test_where_the_platform_assigns_users_no_pod_names_one() -> None:
    for pod in pods(OPENSHIFT):
        assert refusals(pod) == []
        assert "runAsGroup" not in pod["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"] is True


def test_elsewhere_a_pod_names_its_user_so_that_it_is_surely_not_root() -> None:
    for pod in pods(CLUSTER):
        assert {pod["securityContext"][field] for field in ("runAsUser", "runAsGroup", "fsGroup")} == {65532}
        assert [text.partition(":")[0] for text in refusals(pod)] == ["runAsUser", "fsGroup"], "the judge judges"


@pytest.mark.parametrize(("cluster", "said"), [(OPENSHIFT, False), (CLUSTER, True)])
def test_the_settings_win_over_what_is_found(cluster: ClusterFacts, said: bool) -> None:
    for pod in pods(cluster, parse_settings({"openshift": said})):
        assert ("runAsUser" not in pod["securityContext"]) == said


def test_a_user_that_a_template_names_is_taken() -> None:
    template = {"spec": {"securityContext": {"runAsUser": NAMESPACE_IDS[0]}}}
    assert pods(OPENSHIFT, podTemplate=template)[1]["securityContext"]["runAsUser"] == NAMESPACE_IDS[0]
