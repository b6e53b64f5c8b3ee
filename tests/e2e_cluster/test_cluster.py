"""What a cluster is made of: packages, programs, objects."""

from dataclasses import replace
from pathlib import Path

import pytest
from cluster import packages
from cluster.addons import COREDNS_IMAGE, build_addons, build_corefile, build_storage_classes
from cluster.builds import KUBERNETES_VERSION, PROGRAMS
from cluster.node import find_nameservers
from cluster.paths import Paths
from cluster.pki import build_kubeconfig
from cluster.shell import ClusterError, run, wait_until


def test_a_program_is_built_again_where_its_version_or_source_changes(tmp_path: Path) -> None:
    node = PROGRAMS["node"]()
    assert node.key == PROGRAMS["node"]().key
    assert node.sources is not None
    copy = tmp_path / "node"
    copy.mkdir()
    for source in node.sources.glob("*.go"):
        (copy / source.name).write_bytes(source.read_bytes())
    moved = replace(node, sources=copy)
    assert moved.key == node.key
    (copy / "main.go").write_text("package main\n")
    keys = {moved.key, node.key, replace(node, go_mod=node.go_mod + "\n").key, replace(node, variables={}).key}
    assert len(keys) == 4


def test_kubernetes_is_of_one_version_throughout() -> None:
    node = PROGRAMS["node"]()
    _, minor, patch = KUBERNETES_VERSION.split(".")
    replaced = [line.split() for line in node.go_mod.splitlines() if "=>" in line]
    assert {words[3] for words in replaced} == {f"v0.{minor}.{patch}"}
    assert all(words[0] == words[2] for words in replaced)
    assert node.variables["k8s.io/component-base/version.gitVersion"] == f"v{KUBERNETES_VERSION}"


def test_missing_packages_are_named_to_one_who_may_not_install(monkeypatch: pytest.MonkeyPatch) -> None:
    provides = {"shell": ("sh",), "moon": ("moon", "sh"), "file": ("/nowhere/file",)}
    monkeypatch.setattr(packages, "PROVIDES", provides)
    assert packages.find_missing(provides) == ["moon", "file"]
    packages.ensure_packages(["shell"])
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(packages.shutil, "which", lambda name, path=None: "/usr/bin/apt-get" if "apt" in name else None)
    with pytest.raises(ClusterError, match="apt-get install --no-install-recommends moon file"):
        packages.ensure_packages(["moon", "file"])


def test_one_storage_class_is_the_default_and_all_can_grow() -> None:
    classes = build_storage_classes()
    default = [c for c in classes if c["metadata"]["annotations"]]
    assert [c["metadata"]["name"] for c in default] == ["standard"]
    assert all(c["allowVolumeExpansion"] for c in classes)


def test_cluster_dns_asks_the_machines_name_servers_if_it_has_any() -> None:
    assert "forward . 192.0.2.1 192.0.2.2\n" in build_corefile(["192.0.2.1", "192.0.2.2"])
    assert "forward" not in build_corefile([])
    deployments = [o for o in build_addons([]) if o["kind"] == "Deployment"]
    (container,) = deployments[0]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == COREDNS_IMAGE


def test_a_resolver_that_pods_cannot_reach_is_passed_over(tmp_path: Path) -> None:
    stub, real = tmp_path / "stub", tmp_path / "real"
    stub.write_text("nameserver 127.0.0.53\noptions edns0\n")
    real.write_text("# made by hand\nnameserver ::1\nnameserver 192.0.2.7\nnameserver\nsearch example\n")
    assert find_nameservers((tmp_path / "none", stub, real)) == ["192.0.2.7"]
    assert find_nameservers((stub,)) == []


def test_a_kubeconfig_has_everything_in_it() -> None:
    content = build_kubeconfig(server="https://192.0.2.1:6443", authority=b"a", user={"token": "t"})
    assert content["clusters"] == [
        {"name": "quire", "cluster": {"server": "https://192.0.2.1:6443", "certificate-authority-data": "YQ=="}}
    ]
    assert content["users"] == [{"name": "quire", "user": {"token": "t"}}]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path))
    assert Paths.from_environment().kubeconfig == tmp_path / "cluster" / "kubeconfig"
    monkeypatch.setenv("QUIRE_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Paths.from_environment().root == tmp_path / "home" / ".cache" / "quire" / "cluster"


def test_a_tool_that_fails_shows_the_end_of_what_it_said() -> None:
    with pytest.raises(ClusterError, match=r"status 3:\n(.*\n)*the reason") as caught:
        run(["sh", "-c", "seq 1000; echo the reason >&2; exit 3"])
    assert len(str(caught.value).splitlines()) < 30
    with pytest.raises(ClusterError, match="no-such-tool is not installed"):
        run(["no-such-tool"])
    with pytest.raises(ClusterError, match="did not end within"):
        run(["sleep", "60"], timeout_s=0.05)


def test_waiting_ends_with_a_reason(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("bind: address already in use\n")
    with pytest.raises(ClusterError, match="server ready: it has ended"):
        wait_until(lambda: False, "server ready", timeout_s=60, give_up=lambda: "it has ended")
    with pytest.raises(ClusterError, match=r"server ready: not within 0 s\n(.*\n)*bind: address already in use"):
        wait_until(lambda: False, "server ready", timeout_s=0, log=log)
    wait_until(lambda: True, "truth", timeout_s=0, give_up=lambda: "never asked")
