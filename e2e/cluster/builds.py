"""Go programs of the cluster: which versions, how they are built, and where the results are kept.

A binary's file name carries a digest of everything it is made from, so a changed version or source is a new build and
an unchanged one is none. Needs Go only where something is to be built. Modules come through GOPROXY, whatever it says.
"""

import hashlib
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.paths import Paths
from cluster.shell import ClusterError, locked, run_logged

# The newest Kubernetes that still takes cgroup v1 and the containerd 1.6 of Debian 12.
KUBERNETES_VERSION = "1.34.2"
HELM_VERSION = "3.19.2"
COREDNS_VERSION = "1.13.1"

_SOURCES = Path(__file__).parent / "go"
_ENVIRONMENT = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"}
_OLDEST_GO = "1.24"
# k8s.io/kubernetes names these without a version: each must be replaced by the release that belongs to it.
_STAGING_MODULES = (
    *("api", "apiextensions-apiserver", "apimachinery", "apiserver", "cli-runtime", "client-go", "cloud-provider"),
    *("cluster-bootstrap", "code-generator", "component-base", "component-helpers", "controller-manager", "cri-api"),
    *("cri-client", "cri-streaming", "csi-translation-lib", "dynamic-resource-allocation", "endpointslice"),
    *("externaljwt", "kms", "kube-aggregator", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl"),
    *("kubelet", "metrics", "mount-utils", "pod-security-admission", "sample-apiserver"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoProgram:
    """One program: its own sources with a go.mod of ours, or a package of a published module."""

    name: str
    sources: Path | None = None
    go_mod: str = ""
    package: str = ""  # of a published module, with its version: path@vX.Y.Z
    variables: Mapping[str, str]  # set at link time

    @property
    def key(self) -> str:
        """Digest of all that the binary is made from."""
        digest = hashlib.sha256()
        for part in (self.go_mod, self.package, *self._flags(), platform.machine()):
            digest.update(part.encode() + b"\0")
        for source in sorted(self.sources.glob("*.go")) if self.sources else ():
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        return digest.hexdigest()[:12]

    def build(self, output: Path, work: Path, log: Path) -> None:
        """Build the program. `work` is a directory of its own."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        made = work / "out" / self.name
        if self.sources is None:
            environment = {**_ENVIRONMENT, "GOBIN": str(made.parent)}
            run_logged(["go", "install", "-v", *self._flags(), self.package], log, cwd=work, env=environment)
        else:
            for source in self.sources.glob("*.go"):
                shutil.copy(source, work)
            (work / "go.mod").write_text(self.go_mod)
            run_logged(["go", "mod", "tidy"], log, cwd=work, env=_ENVIRONMENT)
            run_logged(["go", "build", "-v", *self._flags(), "-o", made, "."], log, cwd=work, env=_ENVIRONMENT)
        output.parent.mkdir(parents=True, exist_ok=True)
        made.rename(output)
        shutil.rmtree(work)

    def _flags(self) -> list[str]:
        settings = " ".join(f"-X {name}={value}" for name, value in self.variables.items())
        return ["-trimpath", "-ldflags", f"-s -w {settings}".rstrip()]


def _node() -> GoProgram:
    major, minor, patch = KUBERNETES_VERSION.split(".")
    staging = f"v0.{minor}.{patch}"
    replaces = "\n".join(f"\tk8s.io/{module} => k8s.io/{module} {staging}" for module in _STAGING_MODULES)
    version = f"v{KUBERNETES_VERSION}"
    return GoProgram(
        name="node",
        sources=_SOURCES / "node",
        go_mod=(
            "module quire.dev/e2e/cluster/node\n\ngo 1.24.0\n\n"
            f"require k8s.io/kubernetes {version}\n\nreplace (\n{replaces}\n)\n"
        ),
        variables={
            "k8s.io/component-base/version.gitVersion": version,
            "k8s.io/component-base/version.gitMajor": major,
            "k8s.io/component-base/version.gitMinor": minor,
            "k8s.io/client-go/pkg/version.gitVersion": version,
        },
    )


def _helm() -> GoProgram:
    major, minor, _ = KUBERNETES_VERSION.split(".")
    module = "helm.sh/helm/v3"
    return GoProgram(
        name="helm",
        package=f"{module}/cmd/helm@v{HELM_VERSION}",
        variables={
            f"{module}/internal/version.version": f"v{HELM_VERSION}",
            f"{module}/pkg/lint/rules.k8sVersionMajor": major,
            f"{module}/pkg/lint/rules.k8sVersionMinor": minor,
            f"{module}/pkg/chartutil.k8sVersionMajor": major,
            f"{module}/pkg/chartutil.k8sVersionMinor": minor,
        },
    )


def _coredns() -> GoProgram:
    return GoProgram(name="coredns", package=f"github.com/coredns/coredns@v{COREDNS_VERSION}", variables={})


def _pause() -> GoProgram:
    go_mod = "module quire.dev/e2e/cluster/pause\n\ngo 1.24.0\n"
    return GoProgram(name="pause", sources=_SOURCES / "pause", go_mod=go_mod, variables={})


PROGRAMS: Mapping[str, Callable[[], GoProgram]] = {"node": _node, "helm": _helm, "coredns": _coredns, "pause": _pause}


def ensure_binaries(paths: Paths, names: Sequence[str]) -> dict[str, Path]:
    """Return the binaries by name, building those that are missing or whose inputs have changed.

    `kubectl` (in the node's binary) and `helm` are linked under their plain names beside them.
    """
    found = {}
    with locked(paths.programs_lock):
        for name in names:
            program = PROGRAMS[name]()
            binary = paths.binaries / f"{name}-{program.key}"
            if not binary.exists():
                _build(program, binary, paths)
            found[name] = binary
            if name in ("node", "helm"):
                _link(paths.binaries / ("kubectl" if name == "node" else name), binary)
    return found


def _build(program: GoProgram, binary: Path, paths: Paths) -> None:
    if shutil.which("go") is None:
        raise ClusterError(f"{program.name} must be built: install Go {_OLDEST_GO} or newer and have `go` on PATH")
    log = paths.build_logs / f"build-{program.name}.log"
    print(f"Building {program.name} (minutes the first time; {log})", flush=True)
    log.unlink(missing_ok=True)
    program.build(binary, paths.build_sources / program.name, log)
    for old in paths.binaries.glob(f"{program.name}-*"):
        if old != binary:
            old.unlink()


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == Path(target.name):
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
