"""Where things of the cluster lie: what is kept between runs, and what `cluster-down` removes. None is in the tree."""

import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """The directories of one cache."""

    root: Path

    @classmethod
    def from_environment(cls) -> "Paths":
        """Return the paths under QUIRE_CACHE, or under ~/.cache/quire."""
        cache = os.environ.get("QUIRE_CACHE") or Path.home() / ".cache" / "quire"
        return cls(root=Path(cache).expanduser().resolve() / "cluster")

    # Kept: rebuilt only when what they are made from changes.

    @property
    def binaries(self) -> Path:
        return self.root / "bin"

    @property
    def build_sources(self) -> Path:
        return self.root / "build"

    @property
    def build_logs(self) -> Path:
        return self.root / "log"

    @property
    def archives(self) -> Path:
        return self.root / "images"

    @property
    def buildah(self) -> Path:
        return self.root / "buildah"

    @property
    def containerd(self) -> Path:
        return self.root / "containerd"

    # One cluster's life.

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def control_planes(self) -> Path:
        return self.root / "control-planes"

    @property
    def kubeconfig(self) -> Path:
        return self.root / "kubeconfig"

    # Held while something under them is made or removed.

    @property
    def cluster_lock(self) -> Path:
        return self.root / "cluster.lock"

    @property
    def programs_lock(self) -> Path:
        return self.root / "programs.lock"

    @property
    def images_lock(self) -> Path:
        return self.root / "images.lock"
