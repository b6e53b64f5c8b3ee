"""containerd in a mount namespace of its own, with its own configuration, socket and state.

Kubelet and containerd have directories that no flag moves (`/var/lib/kubelet`, `/var/lib/cni`, …). In this namespace
they are bound to directories of the cluster's state, so the machine's own are never touched; and every mount, pod and
network namespace in it is gone when its last process is. Only images stay in the cache from one cluster to the next.
"""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.network import write_cni_config
from cluster.processes import Service, find_processes, stop_process
from cluster.shell import ClusterError, run, succeeds, wait_until

PAUSE_IMAGE = "quire.local/pause:1"
_KUBERNETES_NAMESPACE = "k8s.io"
_BOUND_DIRECTORIES = ("/run/containerd", "/run/netns", "/var/lib/cni", "/var/lib/kubelet", "/var/log/containers")
# Its arguments: pairs of a directory and what it is bound to, then `--`, then the command.
_ENTER = """\
mount --make-rshared / || exit
while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit; shift 2; done
shift
exec "$@"
"""
_CGROUPS = Path("/sys/fs/cgroup")
_IMPORT_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """containerd: its images are under `images`, all else under `state`, its socket in `sockets`.

    A socket's path must be short, and a home directory's may not be.
    """

    state: Path
    images: Path
    sockets: Path

    @property
    def service(self) -> Service:
        return Service(name="containerd", directory=self.state / "services")

    @property
    def socket(self) -> Path:
        return self.sockets / "containerd.sock"

    @property
    def _bound(self) -> Path:
        return self.state / "bound"

    def start(self) -> None:
        """Start containerd and wait until it answers. No container of an earlier life is left in it."""
        configuration = self._write_configuration()
        write_cni_config(self.state / "cni")
        bindings: list[str | Path] = []
        created = []
        for target in _BOUND_DIRECTORIES:
            source = self._bound / target.strip("/").replace("/", "-")
            source.mkdir(parents=True, exist_ok=True)
            if not Path(target).exists():
                Path(target).mkdir(parents=True)
                created.append(target)
            bindings += [source, os.path.realpath(target)]
        (self.state / "created.json").write_text(json.dumps(created))
        containerd: list[str | Path] = ["containerd", "--config", configuration]
        self.service.start(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, "sh", *bindings, "--", *containerd]
        )
        wait_until(
            lambda: succeeds(self._ctr("version")),
            "containerd answers",
            timeout_s=30,
            log=self.service.log,
            give_up=self.service.describe_end,
        )
        self._remove_containers()

    def within(self) -> list[str | Path]:
        """Return the words before a command that make it run in containerd's mount namespace."""
        record = self.service.find()
        if record is None:
            raise ClusterError(f"containerd does not run; see {self.service.log}")
        return ["nsenter", f"--mount=/proc/{record.pid}/ns/mnt", "--"]

    def stop(self) -> None:
        """End every container, then containerd, and remove what they leave outside the state directory."""
        _kill_cgroup_members()
        if self.service.find() is not None:
            with suppress(ClusterError):  # the next start removes what is left in the store
                self._remove_containers()
        for shim in find_processes(str(self.socket)):
            stop_process(shim, grace_s=0)
        _kill_cgroup_members()
        self.service.stop()
        _remove_cgroups()
        self._remove_created()

    def list_images(self) -> dict[str, str]:
        """Return the digest of each image by its name."""
        rows = [line.split() for line in run(self._ctr("images", "list")).splitlines()[1:]]
        return {row[0]: row[2] for row in rows}

    def import_archive(self, archive: Path) -> None:
        """Import an OCI archive's images."""
        run(self._ctr("images", "import", archive), timeout_s=_IMPORT_TIMEOUT_S)

    def remove_images(self, names: Sequence[str]) -> None:
        """Remove images' names; what no other name needs of their content goes too."""
        run(self._ctr("images", "remove", *names))

    def _ctr(self, *arguments: str | Path) -> list[str | Path]:
        return ["ctr", "--address", self.socket, "--namespace", _KUBERNETES_NAMESPACE, *arguments]

    def _remove_containers(self) -> None:
        tasks = run(self._ctr("tasks", "list", "--quiet")).split()
        if tasks:
            with suppress(ClusterError):  # a task that has ended meanwhile is no failure
                run(self._ctr("tasks", "delete", "--force", *tasks))
        containers = run(self._ctr("containers", "list", "--quiet")).split()
        if containers:
            run(self._ctr("containers", "delete", *containers))

    def _write_configuration(self) -> Path:
        """Write containerd's configuration; return its path."""
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        text = f"""\
version = 2
root = "{self.images}"
state = "{self.state / "containerd"}"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{self.state / "opt"}"
[{cri}]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE no process may lower its score, and runc would fail to start pods.
  restrict_oom_score_adj = true
  [{cri}.cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{self.state / "cni"}"
"""
        self.sockets.mkdir(parents=True, exist_ok=True)
        path = self.state / "containerd.toml"
        path.write_text(text)
        return path

    def _remove_created(self) -> None:
        try:
            created = json.loads((self.state / "created.json").read_text())
        except (OSError, ValueError):
            created = []
        for target in created:
            with suppress(OSError):  # somebody else uses it now
                Path(target).rmdir()


def _pod_cgroups() -> Iterator[Path]:
    """Yield every cgroup of pods, children before parents, for either version of cgroups."""
    for top in [*_CGROUPS.glob("kubepods"), *_CGROUPS.glob("*/kubepods")]:
        for directory, _, _ in os.walk(top, topdown=False):
            yield Path(directory)


def _kill_cgroup_members() -> None:
    for cgroup in _pod_cgroups():
        with suppress(OSError):
            for pid in (cgroup / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def _remove_cgroups() -> None:
    def is_removed() -> bool:
        for cgroup in _pod_cgroups():
            with suppress(OSError):
                cgroup.rmdir()
        return next(_pod_cgroups(), None) is None

    wait_until(is_removed, "pods' processes gone from their cgroups", timeout_s=20)
