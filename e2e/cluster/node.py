"""A real single-node Kubernetes on this machine: its whole life, from nothing to Ready and back to nothing.

    sys.path.insert(0, "e2e")
    from cluster.node import Node, running_node

    with running_node() as node:          # leaves a cluster that was up before as it is
        node.admin("get", "nodes")        # kubectl
        node.control_plane.restart_api_server()

Invariants: `up` of a cluster that is up changes nothing; `down` needs no more than the state directory, and works after
an `up` that failed half way; both hold a lock, so two of them never meet.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import network
from cluster.addons import DNS_ADDRESS, DNS_DOMAIN, GPU_RESOURCE, build_addons
from cluster.builds import ensure_binaries
from cluster.control_plane import ControlPlane, remove_abandoned
from cluster.images import ensure_system_archives, import_if_changed, remove_replaced
from cluster.kubectl import Kubectl
from cluster.packages import PROVIDES, ensure_packages
from cluster.paths import Paths
from cluster.processes import Service
from cluster.runtime import Runtime
from cluster.shell import ClusterError, locked, wait_until

NODE_NAME = "quire-node"
NUM_FAKE_GPUS = 2
API_PORT = 6443
_SOCKETS = Path("/run/quire-cluster")
_READY_TIMEOUT_S = 90.0
_NODE_SERVICES = ("kubelet", "kube-proxy", "volume-provisioner", "kube-scheduler", "kube-controller-manager")
_RESOLVER_FILES = (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The one cluster of a cache directory."""

    paths: Paths
    binaries: dict[str, Path]

    @property
    def control_plane(self) -> ControlPlane:
        return ControlPlane(
            directory=self.paths.state, node_binary=self.binaries["node"], address=network.NODE_ADDRESS, port=API_PORT
        )

    @property
    def runtime(self) -> Runtime:
        return Runtime(state=self.paths.state, images=self.paths.containerd, sockets=_SOCKETS)

    @property
    def kubeconfig(self) -> Path:
        """An administrator's kubeconfig; the path is the same in every life of the cluster."""
        return self.paths.kubeconfig

    @property
    def admin(self) -> Kubectl:
        return Kubectl(binary=self.binaries["node"].with_name("kubectl"), kubeconfig=self.kubeconfig)

    @property
    def helm(self) -> Path:
        return self.binaries["helm"]

    @property
    def volumes(self) -> Path:
        """Where the volumes' directories are, as seen by pods' node."""
        return self.paths.state / "volumes"

    def service(self, name: str) -> Service:
        """Return one of the node's processes by its component's name."""
        return Service(name=name, directory=self.paths.state / "services")

    def load_image(self, archive: Path) -> list[str]:
        """Import an OCI archive's images into the node unless they are there unchanged; return their names."""
        return import_if_changed(self.runtime, archive)

    def is_up(self) -> bool:
        """Tell whether every process runs and the node is Ready."""
        services = [self.service(name) for name in (*_NODE_SERVICES, "containerd", "etcd", "kube-apiserver")]
        return (
            self.kubeconfig.exists()
            and all(service.find() for service in services)
            and self.admin.answers("wait", "--for=condition=Ready", f"node/{NODE_NAME}", "--timeout=2s")
        )

    def start(self) -> None:
        """Bring the cluster up from nothing; the state directory must not exist."""
        archives = ensure_system_archives(self.paths, self.binaries)
        network.remove_links()  # of a cluster whose state somebody has deleted
        _refuse_foreign_cluster()
        self.paths.state.mkdir(parents=True)
        network.save_settings(self.paths.state / "settings.json")
        network.create_node_link()
        network.refuse_unknown_services()
        with ThreadPoolExecutor() as pool:
            runtime_ready = pool.submit(self._start_runtime, archives)
            self.control_plane.start(extra_flags=[f"--advertise-address={network.NODE_ADDRESS}"])
            self.control_plane.wait()
            self._start_controllers()
            runtime_ready.result()
        self._start_node_services()
        self.control_plane.pki.write_kubeconfig("admin", self.control_plane.server, self.kubeconfig)
        self.admin.apply(build_addons(find_nameservers(_RESOLVER_FILES)))
        self._wait_ready()

    def stop(self) -> None:
        """Remove the cluster and every trace of it but the cache; without a state directory there is nothing."""
        if not self.paths.state.exists():
            return
        for name in _NODE_SERVICES:
            self.service(name).stop()
        self.runtime.stop()
        self.control_plane.stop()
        network.remove_links()
        network.remove_rules()
        network.forget_connections()
        network.restore_settings(self.paths.state / "settings.json")
        shutil.rmtree(_SOCKETS, ignore_errors=True)
        self.kubeconfig.unlink(missing_ok=True)
        shutil.rmtree(self.paths.state)

    def set_fake_gpus(self, count: int) -> None:
        """Have the node say that it has GPUs. Pods that ask for them are scheduled, and get no device."""
        patch = {"status": {"capacity": {GPU_RESOURCE: str(count)}}}
        self.admin("patch", "node", NODE_NAME, "--subresource=status", "--type=merge", "-p", json.dumps(patch))

    def _start_runtime(self, archives: list[Path]) -> None:
        self.runtime.start()
        remove_replaced(self.runtime, self.paths.archives)
        for archive in archives:
            import_if_changed(self.runtime, archive)

    def _start_controllers(self) -> None:
        pki = self.control_plane.pki
        binary = self.binaries["node"]
        for name in ("kube-controller-manager", "kube-scheduler"):
            pki.issue(name, user=f"system:{name}")
            config = pki.write_kubeconfig(name, self.control_plane.server)
            flags = [
                f"--kubeconfig={config}",
                f"--authentication-kubeconfig={config}",
                f"--authorization-kubeconfig={config}",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
                f"--cert-dir={self.paths.state / 'generated'}",
            ]
            if name == "kube-controller-manager":
                flags += [
                    f"--root-ca-file={pki.ca}",
                    f"--service-account-private-key-file={pki.service_account_key}",
                    f"--cluster-signing-cert-file={pki.ca}",
                    f"--cluster-signing-key-file={pki.ca_key}",
                    "--use-service-account-credentials=true",
                    f"--flex-volume-plugin-dir={self.paths.state / 'volume-plugins'}",
                ]
            self.service(name).start([binary, name, *flags])

    def _start_node_services(self) -> None:
        pki = self.control_plane.pki
        server = self.control_plane.server
        binary = self.binaries["node"]
        node_hosts = [f"DNS:{NODE_NAME}", f"IP:{network.NODE_ADDRESS}"]
        pki.issue("kubelet", user=f"system:node:{NODE_NAME}", groups=["system:nodes"], hosts=node_hosts)
        kubelet = [
            f"--config={self._write_kubelet_config()}",
            f"--kubeconfig={pki.write_kubeconfig('kubelet', server)}",
            f"--hostname-override={NODE_NAME}",
            f"--node-ip={network.NODE_ADDRESS}",
            f"--cert-dir={self.paths.state / 'generated'}",
        ]
        self.service("kubelet").start([*self.runtime.within(), binary, "kubelet", *kubelet])
        pki.issue("kube-proxy", user="system:kube-proxy")
        proxy = [
            f"--kubeconfig={pki.write_kubeconfig('kube-proxy', server)}",
            f"--hostname-override={NODE_NAME}",
            "--proxy-mode=iptables",
            f"--cluster-cidr={network.POD_CIDR}",
            f"--healthz-bind-address={network.NODE_ADDRESS}:10256",
            "--iptables-localhost-nodeports=false",
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
        ]
        self.service("kube-proxy").start([binary, "kube-proxy", *proxy])
        self.volumes.mkdir()
        volumes = [f"--kubeconfig={pki.kubeconfig('admin')}", f"--root={self.volumes}"]
        self.service("volume-provisioner").start([*self.runtime.within(), binary, "volume-provisioner", *volumes])

    def _write_kubelet_config(self) -> Path:
        pki = self.control_plane.pki
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": network.NODE_ADDRESS,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(pki.ca)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(pki.certificate("kubelet")),
            "tlsPrivateKeyFile": str(pki.key("kubelet")),
            "containerRuntimeEndpoint": f"unix://{self.runtime.socket}",
            "clusterDNS": [DNS_ADDRESS],
            "clusterDomain": DNS_DOMAIN,
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "makeIPTablesUtilChains": False,
            "podLogsDir": str(self.paths.state / "pod-logs"),
            "volumePluginDir": str(self.paths.state / "volume-plugins"),
            # The node shares its disk and its images with others: no eviction or collection but near the very end.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
        }
        path = self.paths.state / "kubelet.json"
        path.write_text(json.dumps(config, indent=2))
        return path

    def _wait_ready(self) -> None:
        kubelet = self.service("kubelet")
        wait_until(
            lambda: self.admin.answers("get", "node", NODE_NAME),
            "node registered",
            timeout_s=_READY_TIMEOUT_S,
            log=kubelet.log,
            give_up=kubelet.describe_end,
        )
        self.set_fake_gpus(NUM_FAKE_GPUS)
        wait_until(
            lambda: self.admin.answers("wait", "--for=condition=Ready", f"node/{NODE_NAME}", "--timeout=2s"),
            "node ready",
            timeout_s=_READY_TIMEOUT_S,
            log=kubelet.log,
            give_up=kubelet.describe_end,
        )
        controllers = self.service("kube-controller-manager")
        wait_until(
            lambda: self.admin.answers("get", "serviceaccount", "default"),
            "service account of the default namespace",
            timeout_s=_READY_TIMEOUT_S,
            log=controllers.log,
            give_up=controllers.describe_end,
        )
        wait_until(
            lambda: self.admin.answers("rollout", "status", "-n=kube-system", "deployment/coredns", "--timeout=2s"),
            "cluster DNS ready",
            timeout_s=_READY_TIMEOUT_S,
            log=kubelet.log,
        )


def find_node(paths: Paths | None = None) -> Node:
    """Return the cluster of a cache directory, up or not; its programs are built if they are not yet."""
    paths = paths or Paths.from_environment()
    return Node(paths=paths, binaries=ensure_binaries(paths, ["node", "helm", "coredns", "pause"]))


def up() -> Node:
    """Bring the cluster up unless it is; replace one that has lost a part."""
    _require_root()
    paths = Paths.from_environment()
    with locked(paths.cluster_lock):
        ensure_packages(PROVIDES)
        node = find_node(paths)
        if node.is_up():
            return node
        node.stop()
        try:
            node.start()
        except BaseException:
            print(f"Left as it is, for a look at {paths.state}; `make cluster-down` removes it", flush=True)
            raise
        return node


def down() -> None:
    """Remove the cluster, and the API servers that tests have abandoned."""
    _require_root()
    paths = Paths.from_environment()
    with locked(paths.cluster_lock):
        # No build here: a cluster that was never up has no programs, and stopping needs none.
        Node(paths=paths, binaries={"node": paths.binaries / "kubectl"}).stop()
        remove_abandoned(paths)


@contextmanager
def running_node() -> Iterator[Node]:
    """Bring a cluster up for a while; one that was up before stays."""
    was_up = find_node().is_up()
    node = up()
    try:
        yield node
    finally:
        if not was_up:
            down()


def find_nameservers(files: tuple[Path, ...]) -> list[str]:
    """Return the machine's name servers that a pod can reach, of the first file that has any."""
    for file in files:
        if file.exists():
            rows = [line.split() for line in file.read_text().splitlines()]
            servers = [row[1] for row in rows if len(row) > 1 and row[0] == "nameserver"]
            if reachable := [server for server in servers if not server.startswith(("127.", "::1"))]:
                return reachable
    return []


def _refuse_foreign_cluster() -> None:
    if network.has_foreign_rules():
        raise ClusterError("another Kubernetes node runs on this machine (there are iptables chains of its kube-proxy)")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 10250)) == 0:
            raise ClusterError("another kubelet runs on this machine (port 10250 is taken)")


def _require_root() -> None:
    if os.geteuid() != 0:
        raise ClusterError("a node needs root: sudo make cluster")
