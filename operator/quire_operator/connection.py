"""How to reach the API server, and as whom: $KUBECONFIG, else the pod's service account, else ~/.kube/config.

Outside of a cluster through a proxy, where the kubeconfig names one, or $HTTPS_PROXY does and $NO_PROXY does not except
the server. Reads files and the environment only. Both kopf and our own client ask again from time to time, because a
service account's token rotates.
"""

import dataclasses
import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import kopf

from quire_contract.nesting import bounded_nesting


class ConnectionSettingsError(Exception):
    """Nothing usable says where the API server is."""


def load_connection() -> kopf.ConnectionInfo:
    """Read the credentials as they are now.

    Raises:
        ConnectionSettingsError: there are none, or they cannot be read.
    """
    settings = kopf.OperatorSettings()
    is_explicit = bool(os.environ.get("KUBECONFIG"))
    try:
        found = None if is_explicit else kopf.login_with_service_account(settings=settings)
        if found is not None:
            return _by_address(found)
        with bounded_nesting():
            found = kopf.login_with_kubeconfig(settings=settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConnectionSettingsError(f"the kubeconfig cannot be read: {error!r}") from error
    if found is None:
        raise ConnectionSettingsError(
            f"no API server: this is no pod, $KUBECONFIG is not set, and {Path.home()}/.kube/config is not there"
        )
    return _with_proxy(found)


def _by_address(connection: kopf.ConnectionInfo) -> kopf.ConnectionInfo:
    """Go by the address that the kubelet gives: the cluster's DNS may be down, or not be this pod's."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        return connection
    return dataclasses.replace(
        connection, server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    )


def _with_proxy(connection: kopf.ConnectionInfo) -> kopf.ConnectionInfo:
    """Look the proxy up once, here: an HTTP session that trusts the environment reads it anew at every request."""
    server = urlsplit(connection.server)
    proxy = getproxies().get(server.scheme)
    is_excepted = proxy_bypass(server.netloc) or proxy_bypass(server.hostname or "")
    if connection.proxy_url or not proxy or is_excepted:
        return connection
    return dataclasses.replace(connection, proxy_url=proxy)
