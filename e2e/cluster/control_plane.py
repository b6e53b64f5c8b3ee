"""etcd and kube-apiserver: the half of a cluster that the node shares with tests that need an API server alone.

`api_server_only` is a context manager for such tests and for benchmarks: its own ports and state, any number at a time,
beside a full cluster or without one. Does not know of nodes, containers or images, and needs no root.
"""

import json
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.builds import ensure_binaries
from cluster.kubectl import Kubectl
from cluster.network import SERVICE_CIDR
from cluster.packages import ensure_packages
from cluster.paths import Paths
from cluster.pki import Pki
from cluster.processes import ProcessRecord, Service, read_own_record
from cluster.shell import ClusterError, wait_until

API_SERVICE_ADDRESS = "10.96.0.1"
API_SERVER_PACKAGES = ("etcd-server", "openssl")
_START_TIMEOUT_S = 60.0
_API_SERVER_GRACE_S = 2.0
_OWNER = "owner.json"
_PORTS = range(20000, 30000)  # below NodePorts, and below what Linux gives to outgoing connections
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    """An etcd and an API server with their state in one directory."""

    directory: Path
    node_binary: Path
    address: str
    port: int

    @property
    def server(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def pki(self) -> Pki:
        return Pki(directory=self.directory / "pki")

    @property
    def etcd(self) -> Service:
        return Service(name="etcd", directory=self.directory / "services")

    @property
    def api_server(self) -> Service:
        return Service(name="kube-apiserver", directory=self.directory / "services")

    @property
    def audit_log(self) -> Path:
        """One JSON object per request, where the audit was asked for: `user.username`, `verb`, `objectRef`, …"""
        return self.directory / "audit.log"

    @property
    def admin(self) -> Kubectl:
        return Kubectl(binary=self.node_binary.with_name("kubectl"), kubeconfig=self.pki.kubeconfig("admin"))

    def start(self, *, extra_flags: Sequence[str] = (), audit: bool = False) -> None:
        """Make the certificates and start both. The directory must be new."""
        self._create_pki()
        etcd_port, peer_port = [port for port in find_free_ports(3) if port != self.port][:2]
        etcd_url = f"http://127.0.0.1:{etcd_port}"
        self.etcd.start(_etcd_command(self.directory / "etcd", etcd_url, f"http://127.0.0.1:{peer_port}"))
        audit_flags = self._write_audit_policy() if audit else []
        self.api_server.start([*self._api_server_command(etcd_url), *audit_flags, *extra_flags])

    def wait(self) -> None:
        """Wait until the API server says that it is ready."""
        wait_until(
            lambda: self.admin.answers("get", "--raw", "/readyz"),
            "kube-apiserver ready",
            timeout_s=_START_TIMEOUT_S,
            log=self.api_server.log,
            give_up=lambda: self.etcd.describe_end() or self.api_server.describe_end(),
        )

    def stop_api_server(self) -> None:
        """Stop the API server alone; return when it is gone. Pods and etcd go on.

        It would wait a minute for watches to end by themselves, so it is killed after a moment, as by a lost machine.
        """
        self.api_server.stop(grace_s=_API_SERVER_GRACE_S)

    def start_api_server(self) -> None:
        """Start the API server again as it was, and wait until it is ready."""
        self.api_server.start_again()
        self.wait()

    def restart_api_server(self) -> None:
        """Stop the API server, start it again, wait until it is ready."""
        self.stop_api_server()
        self.start_api_server()

    def stop(self) -> None:
        """Stop both."""
        self.api_server.stop(grace_s=_API_SERVER_GRACE_S)
        self.etcd.stop()

    def create_service_account(self, namespace: str, name: str) -> Path:
        """Create a service account, and return a kubeconfig with a token of its, as the account's pods have one."""
        self.admin("create", "serviceaccount", name, f"--namespace={namespace}")
        token = self.admin("create", "token", name, f"--namespace={namespace}", "--duration=24h").strip()
        return self.pki.write_token_kubeconfig(f"service-account-{namespace}-{name}", self.server, token)

    def _create_pki(self) -> None:
        pki = self.pki
        pki.create_authority()
        names = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
        addresses = ("127.0.0.1", self.address, API_SERVICE_ADDRESS)
        hosts = [f"DNS:{name}" for name in names] + [f"IP:{address}" for address in dict.fromkeys(addresses)]
        pki.issue("apiserver", user="kube-apiserver", hosts=hosts)
        pki.issue("front-proxy", user="front-proxy")
        pki.issue("admin", user="admin", groups=["system:masters"])
        pki.write_kubeconfig("admin", self.server)

    def _write_audit_policy(self) -> list[str]:
        policy = self.directory / "audit-policy.json"
        policy.write_text(json.dumps(_AUDIT_POLICY))
        return [f"--audit-policy-file={policy}", f"--audit-log-path={self.audit_log}"]

    def _api_server_command(self, etcd_url: str) -> list[str | Path]:
        pki = self.pki
        return [
            self.node_binary,
            "kube-apiserver",
            f"--etcd-servers={etcd_url}",
            f"--bind-address={self.address}",
            f"--secure-port={self.port}",
            f"--cert-dir={self.directory / 'generated'}",
            f"--tls-cert-file={pki.certificate('apiserver')}",
            f"--tls-private-key-file={pki.key('apiserver')}",
            f"--client-ca-file={pki.ca}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--service-cluster-ip-range={SERVICE_CIDR}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={pki.service_account_public_key}",
            f"--service-account-signing-key-file={pki.service_account_key}",
            f"--kubelet-client-certificate={pki.certificate('admin')}",
            f"--kubelet-client-key={pki.key('admin')}",
            f"--kubelet-certificate-authority={pki.ca}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={pki.ca}",
            "--requestheader-allowed-names=front-proxy",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={pki.certificate('front-proxy')}",
            f"--proxy-client-key-file={pki.key('front-proxy')}",
        ]


def _etcd_command(data: Path, client_url: str, peer_url: str) -> list[str | Path]:
    return [
        "etcd",
        f"--data-dir={data}",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=default={peer_url}",
        "--unsafe-no-fsync",  # the data does not outlive the cluster
    ]


@contextmanager
def api_server_only(*, audit: bool = False) -> Iterator[ControlPlane]:
    """Run etcd and an API server without nodes or controllers, and remove them at the end.

    `.admin` is kubectl as an administrator, `.admin.kubeconfig` its kubeconfig. With `audit`, every request is a line
    of JSON in `.audit_log`; give what is to be counted an account of its own by `.create_service_account`.
    """
    paths = Paths.from_environment()
    ensure_packages(API_SERVER_PACKAGES)
    binaries = ensure_binaries(paths, ["node"])
    remove_abandoned(paths)
    paths.control_planes.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=paths.control_planes))
    (directory / _OWNER).write_text(json.dumps(read_own_record().as_dict()))
    plane = ControlPlane(
        directory=directory, node_binary=binaries["node"], address="127.0.0.1", port=find_free_ports(1)[0]
    )
    try:
        # A loopback address must not be published as an endpoint; without nodes nobody would follow it either.
        flags = ["--endpoint-reconciler-type=none", "--advertise-address=192.0.2.1"]
        plane.start(extra_flags=flags, audit=audit)
        plane.wait()
        yield plane
    finally:
        plane.stop()
        shutil.rmtree(directory, ignore_errors=True)


def remove_abandoned(paths: Paths) -> None:
    """Stop and remove what `api_server_only` of processes that are gone has left."""
    for directory in paths.control_planes.glob("*/"):
        owner = None
        with suppress(OSError, ValueError, TypeError):
            owner = ProcessRecord(**json.loads((directory / _OWNER).read_text()))
        if owner is None or not owner.is_running():
            for name in ("kube-apiserver", "etcd"):
                Service(name=name, directory=directory / "services").stop()
            shutil.rmtree(directory, ignore_errors=True)


def find_free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on.

    The kernel's own choice for port 0 could be given to somebody else before it is used: to another such question, or
    to an outgoing connection.
    """
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.append(port)
            if len(found) == count:
                return found
    raise ClusterError(f"fewer than {count} free ports in {_PORTS.start}-{_PORTS.stop - 1}")
