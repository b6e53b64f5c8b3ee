"""Where the API server is, who we are there, and by way of which proxy. The judge is kubectl's documented behaviour."""

import asyncio
import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio.config import incluster_config

from quire_kube.connection import Connection, ConnectionSettingsError, load_connection

SERVER = "https://192.0.2.1:6443"
PROXY = "http://proxy.example:3128"
V1 = "client.authentication.k8s.io/v1"
V1BETA1 = "client.authentication.k8s.io/v1beta1"


@pytest.fixture
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    write(path)
    return path


def write(path: Path, user: Mapping[str, Any] | None = None, name: str = "x", **cluster: Any) -> None:
    content = {
        "clusters": [{"name": name, "cluster": {"server": SERVER, **cluster}}],
        "users": [{"name": name, "user": user or {"token": "secret"}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }
    path.write_text(json.dumps(content))


def load() -> Connection:
    return asyncio.run(load_connection())


def script(path: Path, answer: str, code: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\necho x >> '{path}.runs'\ncat <<'END'\n{answer}\nEND\nexit {code}\n")
    path.chmod(0o755)
    return path


def credential(api_version: str = V1, **status: Any) -> str:
    return json.dumps({"apiVersion": api_version, "kind": "ExecCredential", "status": status})


def test_without_a_proxy_there_is_none(kubeconfig: Path) -> None:
    connection = load()
    assert (connection.endpoint.server, connection.endpoint.proxy_url) == (SERVER, None)
    assert connection.headers() == {"Authorization": "Bearer secret"}
    assert "secret" not in repr(connection)


@pytest.mark.parametrize(
    ("exceptions", "proxy"), [("", PROXY), ("192.0.2.1", None), ("192.0.2.1:6443", None), ("example.org", PROXY)]
)
def test_the_environments_proxy_is_taken_unless_it_excepts_the_server(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch, exceptions: str, proxy: str | None
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", exceptions)
    assert load().endpoint.proxy_url == proxy


def test_an_address_of_many_colons_is_excepted_too(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig.write_text(kubeconfig.read_text().replace("192.0.2.1", "[fd00::1]"))
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", "fd00::1")
    assert load().endpoint.proxy_url is None


def test_the_kubeconfigs_own_proxy_comes_first(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    write(kubeconfig, **{"proxy-url": "http://own.example:8080"})
    assert load().endpoint.proxy_url == "http://own.example:8080"


@pytest.mark.parametrize(
    "content",
    ["clusters: 5", "", "{", "current-context: a", "current-context: a\nclusters: []", "clusters: " + "[" * 100_000],
)
def test_a_kubeconfig_that_cannot_be_read_is_told(kubeconfig: Path, content: str) -> None:
    kubeconfig.write_text(content)
    with pytest.raises(ConnectionSettingsError, match="kubeconfig"):
        load()


def test_of_several_files_the_first_word_counts(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    second, missing = tmp_path / "sub" / "second", tmp_path / "missing"
    second.parent.mkdir()
    write(second, {"tokenFile": "token"}, name="y")
    (second.parent / "token").write_text("beside")
    monkeypatch.setenv("KUBECONFIG", f"{missing}:{kubeconfig}:{second}")
    assert load().authorization == "Bearer secret"
    monkeypatch.setenv("KUBECONFIG", f"{second}:{kubeconfig}")
    assert load().authorization == "Bearer beside"  # a path is beside its own file


def test_a_token_file_is_read_again_and_its_newline_is_no_part_of_it(kubeconfig: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    write(kubeconfig, {"token": "written down", "tokenFile": str(token)})
    assert load().authorization == "Bearer old"
    token.write_text("new\n")
    assert load().authorization == "Bearer new"


def test_user_and_password(kubeconfig: Path) -> None:
    write(kubeconfig, {"username": "me", "password": "pass"})
    assert load().authorization == f"Basic {base64.b64encode(b'me:pass').decode()}"


EKS = {"apiVersion": V1BETA1, "args": ["--region", "eu-1", "eks", "get-token"], "command": "aws", "env": None}
GKE = {"apiVersion": V1BETA1, "command": "gke-gcloud-auth-plugin", "installHint": "…", "provideClusterInfo": True}
AKS = {"apiVersion": V1BETA1, "args": ["get-token"], "command": "kubelogin", "env": [{"name": "A", "value": "b"}]}


@pytest.mark.parametrize("plugin", [EKS, GKE, AKS], ids=["eks", "gke", "aks"])
def test_plugins_as_clouds_write_them(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plugin: dict[str, Any]
) -> None:
    """`aws eks update-kubeconfig`, `gcloud container clusters get-credentials`, `kubelogin convert-kubeconfig`."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    script(tmp_path / plugin["command"], credential(V1BETA1, token="of-the-cloud"))
    write(kubeconfig, {"exec": {**plugin, "interactiveMode": "IfAvailable"}})
    assert load().authorization == "Bearer of-the-cloud"


def test_a_plugins_word_lasts_until_shortly_before_it_expires(kubeconfig: Path, tmp_path: Path) -> None:
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1000))
    script(tmp_path / "plugin", credential(token="t", expirationTimestamp=expires))
    write(kubeconfig, {"exec": {"apiVersion": V1, "command": "./plugin"}})  # beside the kubeconfig
    assert 700 < load().lasts_s < 900
    script(tmp_path / "plugin", credential(token="t"))
    assert load().lasts_s == float("inf")


def test_a_client_certificate_of_a_plugin(kubeconfig: Path, tmp_path: Path) -> None:
    script(tmp_path / "plugin", credential(clientCertificateData="CERT", clientKeyData="KEY", token="t"))
    write(kubeconfig, {"exec": {"apiVersion": V1, "command": "./plugin"}})
    connection = load()
    files = (connection.endpoint.cert_file, connection.endpoint.key_file)
    assert [Path(file).read_text() for file in files if file] == ["CERT", "KEY"]
    assert connection.authorization == "Bearer t"


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (credential(token="t"), 3, "process returned 3"),
        (credential(), 0, "neither a token nor a client certificate"),
        (credential(clientCertificateData="CERT"), 0, "with its key"),
        (credential(V1BETA1, token="t"), 0, "does not match"),
        ("log in first", 0, "decode"),
    ],
)
def test_a_plugin_that_fails_is_no_anonymous_user(
    kubeconfig: Path, tmp_path: Path, answer: str, code: int, said: str
) -> None:
    script(tmp_path / "plugin", answer, code)
    write(kubeconfig, {"exec": {"apiVersion": V1, "command": "./plugin"}})
    with pytest.raises(ConnectionSettingsError, match=said):
        load()


def test_a_plugin_that_is_not_installed(kubeconfig: Path) -> None:
    write(kubeconfig, {"exec": {"apiVersion": V1, "command": "no-such-plugin"}})
    with pytest.raises(ConnectionSettingsError, match="no-such-plugin"):
        load()


@pytest.mark.parametrize(
    ("user", "cluster", "field"),
    [
        ({"token": "t", "as": "admin"}, {}, r"users\[\]\.user\.as is not supported"),
        ({"token": "t"}, {"tls-server-name": "a"}, r"clusters\[\]\.cluster\.tls-server-name is not supported"),
    ],
)
def test_what_would_be_left_out_silently_is_refused(
    kubeconfig: Path, user: dict[str, Any], cluster: dict[str, Any], field: str
) -> None:
    write(kubeconfig, user, **cluster)
    with pytest.raises(ConnectionSettingsError, match=field):
        load()


def test_a_pod_goes_by_its_service_account_and_reads_it_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token, ca = tmp_path / "token", tmp_path / "ca.crt"
    token.write_text("old\n")
    ca.write_text("CA")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(ca))
    first = load()
    assert (first.endpoint.server, first.endpoint.ca_file) == ("https://[fd00::1]:443", str(ca))
    assert first.authorization is not None
    assert first.authorization.casefold() == "bearer old"
    token.write_text("new")
    ca.write_text("another CA")
    second = load()
    assert second.authorization is not None
    assert second.authorization.casefold() == "bearer new"
    assert second.endpoint != first.endpoint  # though the file's name is the same
