"""How to reach the API server, and as whom: $KUBECONFIG, else the pod's service account, else ~/.kube/config.

The official package reads them: several files, tokens, client certificates, plugins. Here is what it leaves open or
does otherwise than kubectl: which file's context counts, a token file's precedence and its newline, what a plugin's
failure means, OIDC, $HTTPS_PROXY. A `Connection` is true when it is read; whoever keeps one asks again after `lasts_s`,
and at once when it is refused. Knows no request.
"""

import asyncio
import base64
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import yaml
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import incluster_config
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.config.exec_provider import ExecProvider
from kubernetes.aio.config.kube_config import ConfigNode, KubeConfigLoader, KubeConfigMerger

from quire_contract.nesting import bounded_nesting
from quire_kube.oidc import OidcError, current_tokens, expires_at
from quire_kube.times import parse_time

_FILES_LAST_S: Final = 300.0
"""Tokens of service accounts rotate, and so may every other file."""
_MIN_LASTS_S: Final = 10.0
_PLUGIN_TIMEOUT_S: Final = 60.0
_MAX_CONNECTIONS: Final = 32
_UNSERVED_OF_USERS: Final = ("as", "as-uid", "as-groups", "as-user-extra")
_UNSERVED_OF_CLUSTERS: Final = ("tls-server-name",)


class ConnectionSettingsError(Exception):
    """Nothing usable says where the API server is, or who we are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the API server is, and what TLS and the way to it need."""

    server: str
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = field(default=None, repr=False)
    is_verified: bool = True
    proxy_url: str | None = None
    stamps: tuple[tuple[int, int], ...] = ()
    """Of the files, so that one that has changed makes another endpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """An endpoint, and who we are there."""

    endpoint: Endpoint
    authorization: str | None = field(default=None, repr=False)
    lasts_s: float = _FILES_LAST_S
    """How long it may be used before it is read anew."""

    def headers(self) -> dict[str, str]:
        return {} if self.authorization is None else {"Authorization": self.authorization}


def open_transport(endpoint: Endpoint) -> RESTClientObject:
    """Return the official transport to an endpoint; the caller closes it.

    Raises:
        ConnectionSettingsError: a certificate or a key cannot be used.
    """
    configuration = Configuration(
        host=endpoint.server,
        ssl_ca_cert=endpoint.ca_file,
        cert_file=endpoint.cert_file,
        key_file=endpoint.key_file,
        verify_ssl=endpoint.is_verified,
        proxy=endpoint.proxy_url,
        connection_pool_maxsize=_MAX_CONNECTIONS,
        # The proxy is known by now: a session that trusts the environment reads it anew at every request.
        client_session_kwargs={"trust_env": False},
    )
    try:
        return RESTClientObject(configuration)
    except (OSError, ValueError) as error:
        raise ConnectionSettingsError(f"certificates for {endpoint.server} cannot be used: {error!r}") from error


async def load_connection() -> Connection:
    """Read the credentials as they are now; an exec plugin is run, an OIDC token refreshed.

    Raises:
        ConnectionSettingsError: there are none, or they cannot be read.
    """
    paths = os.environ.get("KUBECONFIG")
    if not paths and Path(incluster_config.SERVICE_TOKEN_FILENAME).exists():
        what, reading = "the pod's service account", _read_service_account()
    else:
        what, reading = "the kubeconfig", _read_kubeconfig(paths or f"{Path.home()}/.kube/config")
    try:
        async with asyncio.timeout(_PLUGIN_TIMEOUT_S):
            return await reading
    except TimeoutError as error:
        raise ConnectionSettingsError(f"{what} gave no credentials within {_PLUGIN_TIMEOUT_S:g} s") from error
    except (ConfigException, OidcError, yaml.YAMLError, aiohttp.ClientError, OSError, *_MALFORMED) as error:
        said = error if isinstance(error, ConfigException | OidcError) else repr(error)
        raise ConnectionSettingsError(f"{what} cannot be read: {said}") from error


_MALFORMED: Final = (ValueError, KeyError, TypeError, AttributeError)


async def _read_service_account() -> Connection:
    """By the address that the kubelet gives: the cluster's DNS may be down, or not be this pod's."""
    configuration = Configuration()
    incluster_config.load_incluster_config(client_configuration=configuration, try_refresh_token=False)
    return _connection(configuration, configuration.proxy)


async def _read_kubeconfig(paths: str) -> Connection:
    with bounded_nesting():
        merger = KubeConfigMerger(paths)
    if merger.config is None:
        raise ConnectionSettingsError(f"no API server: this is no pod, and {paths} is not there")
    context = next((found for found in _current_contexts(merger) if found), None)
    if context is None:
        raise ConnectionSettingsError(f"{paths}: no current-context")
    lasts_s = await _prepare(merger, context)
    configuration = Configuration()
    loader = KubeConfigLoader(merger.config, context, config_base_path=None)
    await loader.load_and_set(configuration)
    return _connection(configuration, configuration.proxy or _proxy_of_environment(configuration.host), lasts_s)


def _current_contexts(merger: KubeConfigMerger) -> Iterator[str | None]:
    """As kubectl takes it the first file's word counts; the official package takes the last one's."""
    return (content.get("current-context") for content in merger.config_files.values())


async def _oidc_token(provider: dict[str, Any], merger: KubeConfigMerger) -> str:
    """Return an id token that lasts; a new one is kept in its file, because its predecessor may be void."""
    new = await current_tokens(provider)
    provider.update(new)
    with suppress(OSError):  # A mounted Secret: the next reading refreshes for itself.
        merger.save_changes()
    return str(provider["id-token"])


async def _prepare(merger: KubeConfigMerger, context_name: str) -> float:
    """Bring the context's user into a form that is read as kubectl reads it; return how long that lasts."""
    config = merger.config
    context = config["contexts"].get_with_name(context_name)["context"]
    cluster = config["clusters"].get_with_name(context["cluster"])
    _refuse_unserved("clusters[].cluster", cluster.value["cluster"], _UNSERVED_OF_CLUSTERS)
    node = config["users"].get_with_name(context.safe_get("user"), safe=True)
    if node is None:
        return _FILES_LAST_S
    user: Mapping[str, Any] = node.value.get("user") or {}
    _refuse_unserved("users[].user", user, _UNSERVED_OF_USERS)
    lasts_s = _FILES_LAST_S
    if "exec" in user:
        status = await _run_plugin(_with_whole_path(user["exec"], node.path))
        user, lasts_s = _user_of_plugin(status), _plugin_lasts_s(status)
    elif (user.get("auth-provider") or {}).get("name") == "oidc":
        token = await _oidc_token(user["auth-provider"]["config"], merger)
        user, lasts_s = {"token": token}, _lasts_s(expires_at(token))
    elif "tokenFile" in user:
        user = {key: value for key, value in user.items() if key != "token"}
    node.value = {**node.value, "user": user}  # not in place: the file's own content may be written back
    return lasts_s


def _refuse_unserved(where: str, content: Mapping[str, Any], unserved: tuple[str, ...]) -> None:
    for name in unserved:
        if content.get(name):
            raise ConnectionSettingsError(f"the kubeconfig's {where}.{name} is not supported: leave it out")


def _with_whole_path(plugin: Mapping[str, Any], kubeconfig: str) -> ConfigNode:
    """A command with a slash is beside the kubeconfig; any other is on $PATH."""
    command = str(plugin.get("command") or "")
    is_beside = os.sep in command and not os.path.isabs(command)
    whole = os.path.join(os.path.dirname(os.path.abspath(kubeconfig)), command) if is_beside else command
    return ConfigNode("exec", {**plugin, "command": whole})


async def _run_plugin(plugin: ConfigNode) -> Mapping[str, Any]:
    try:
        status: Mapping[str, Any] = await ExecProvider(plugin).run()
    except (FileNotFoundError, PermissionError) as error:
        hint = plugin.safe_get("installHint") or "install it, and put it on $PATH"
        raise ConfigException(f"the exec plugin {plugin['command']} cannot be run: {hint}") from error
    return status


def _user_of_plugin(status: Mapping[str, Any]) -> dict[str, Any]:
    """Say as a user of a kubeconfig what a plugin has answered: a token, a client certificate, or both."""
    user = {"token": status["token"]} if status.get("token") else {}
    names = (("client-certificate-data", "clientCertificateData"), ("client-key-data", "clientKeyData"))
    pair = {ours: base64.b64encode(status[theirs].encode()).decode() for ours, theirs in names if status.get(theirs)}
    if len(pair) == 1 or not (user or pair):
        raise ConfigException("the exec plugin gave neither a token nor a client certificate with its key")
    return {**user, **pair}


def _plugin_lasts_s(status: Mapping[str, Any]) -> float:
    """Where a plugin says nothing of when it expires, until it is refused."""
    expiration = parse_time(status.get("expirationTimestamp"))
    return float("inf") if expiration is None else _lasts_s(expiration)


def _lasts_s(expiration: float) -> float:
    """Until shortly before it expires."""
    return max(0.8 * (expiration - time.time()), _MIN_LASTS_S)


def _connection(configuration: Configuration, proxy_url: str | None, lasts_s: float = _FILES_LAST_S) -> Connection:
    token = (configuration.api_key.get("BearerToken") or "").strip()  # a file's last newline is no part of it
    files = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
    stats = [os.stat(path) for path in files if path]
    endpoint = Endpoint(
        server=configuration.host.rstrip("/"),
        ca_file=configuration.ssl_ca_cert,
        cert_file=configuration.cert_file,
        key_file=configuration.key_file,
        is_verified=configuration.verify_ssl,
        proxy_url=proxy_url,
        stamps=tuple((stat.st_mtime_ns, stat.st_ino) for stat in stats),
    )
    return Connection(endpoint=endpoint, authorization=token or None, lasts_s=lasts_s)


def _proxy_of_environment(host: str) -> str | None:
    server = urlsplit(host)
    is_excepted = proxy_bypass(server.netloc) or proxy_bypass(server.hostname or "")
    return None if is_excepted else getproxies().get(server.scheme)
