"""Where the API server is, and by way of which proxy."""

import json
from pathlib import Path

import pytest

from quire_operator.connection import ConnectionSettingsError, load_connection

SERVER = "https://192.0.2.1:6443"
PROXY = "http://proxy.example:3128"


@pytest.fixture
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    write(path)
    return path


def write(path: Path, **cluster: str) -> None:
    content = {
        "clusters": [{"name": "c", "cluster": {"server": SERVER, **cluster}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(content))


def test_without_a_proxy_there_is_none(kubeconfig: Path) -> None:
    connection = load_connection()
    assert (connection.server, connection.token, connection.proxy_url) == (SERVER, "secret", None)


@pytest.mark.parametrize(
    ("exceptions", "proxy"), [("", PROXY), ("192.0.2.1", None), ("192.0.2.1:6443", None), ("example.org", PROXY)]
)
def test_the_environments_proxy_is_taken_unless_it_excepts_the_server(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch, exceptions: str, proxy: str | None
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", exceptions)
    assert load_connection().proxy_url == proxy


def test_an_address_of_many_colons_is_excepted_too(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig.write_text(kubeconfig.read_text().replace("192.0.2.1", "[fd00::1]"))
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", "fd00::1")
    assert load_connection().proxy_url is None


def test_the_kubeconfigs_own_proxy_comes_first(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    write(kubeconfig, **{"proxy-url": "http://own.example:8080"})
    assert load_connection().proxy_url == "http://own.example:8080"


@pytest.mark.parametrize("text", ["clusters: 5", "clusters: " + "[" * 100_000 + "]" * 100_000])
def test_a_kubeconfig_that_cannot_be_read_is_told(kubeconfig: Path, text: str) -> None:
    kubeconfig.write_text(text)
    with pytest.raises(ConnectionSettingsError, match="kubeconfig cannot be read"):
        load_connection()
