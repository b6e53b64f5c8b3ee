"""The machine's packages: install what is missing where that is possible, else say which are needed."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.shell import ClusterError, run

# Debian package → a file that it brings, which tells more than the package database where a tool came another way.
PROVIDES: Mapping[str, tuple[str, ...]] = {
    "buildah": ("buildah",),
    "conntrack": ("conntrack",),
    "containerd": ("containerd", "ctr", "containerd-shim-runc-v2"),
    "containernetworking-plugins": ("/usr/lib/cni/bridge", "/usr/lib/cni/host-local"),
    "debootstrap": ("debootstrap",),
    "etcd-server": ("etcd",),
    "iproute2": ("ip",),
    "iptables": ("iptables", "iptables-restore"),
    "mount": ("mount",),
    "openssl": ("openssl",),
    "runc": ("runc",),
    "util-linux": ("nsenter", "unshare"),
}
_SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INSTALL_TIMEOUT_S = 600.0


def find_missing(packages: Iterable[str]) -> list[str]:
    """Return those of the packages of which a file is missing."""
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_DIRECTORIES}"
    return [
        package
        for package in packages
        if not all(Path(f).exists() if f.startswith("/") else shutil.which(f, path=path) for f in PROVIDES[package])
    ]


def ensure_packages(packages: Iterable[str]) -> None:
    """Install the packages that are missing. Raises ClusterError with their names where it may not or cannot."""
    missing = find_missing(packages)
    if not missing:
        return
    names = " ".join(missing)
    if shutil.which("apt-get") is None:
        raise ClusterError(f"this machine lacks, by their Debian names: {names}. Install them and try again")
    if os.geteuid() != 0:
        raise ClusterError(f"this machine lacks packages. As root: apt-get install --no-install-recommends {names}")
    print(f"Installing {names}", flush=True)
    # Some packages start a daemon on installation; the cluster runs its own.
    environment = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    try:
        run(install, env=environment, timeout_s=_INSTALL_TIMEOUT_S)
    except ClusterError:
        run(["apt-get", "update"], timeout_s=_INSTALL_TIMEOUT_S)  # the lists may be old, or not there yet
        run(install, env=environment, timeout_s=_INSTALL_TIMEOUT_S)
