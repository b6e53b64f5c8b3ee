"""Images in the node's containerd: the cluster's own (pause, CoreDNS), and any OCI archive.

Invariants: an image that is there with the same digest is not imported again; a fresh cluster has no image of the
repository's Dockerfile that has been replaced by a newer build.
"""

import tempfile
from pathlib import Path

from cluster.addons import COREDNS_IMAGE
from cluster.oci import read_images, write_image, write_layer
from cluster.paths import Paths
from cluster.runtime import PAUSE_IMAGE, Runtime

BUILT_PREFIX = "localhost/quire-"
"""What the names of images begin with that are built from the repository."""


def ensure_system_archives(paths: Paths, binaries: dict[str, Path]) -> list[Path]:
    """Return the archives of the images that the cluster itself runs, written where they are missing or old."""
    archives = []
    for program, image in (("pause", PAUSE_IMAGE), ("coredns", COREDNS_IMAGE)):
        binary = binaries[program]
        archive = paths.archives / f"{binary.name}.tar"
        if not archive.exists():
            for old in paths.archives.glob(f"{program}-*.tar"):
                old.unlink()
            _write_program_image(archive, image, binary, program)
        archives.append(archive)
    return archives


def import_if_changed(runtime: Runtime, archive: Path) -> list[str]:
    """Import the images of an archive that the node has not, or has with other content; return all their names."""
    wanted = read_images(archive)
    present = runtime.list_images()
    if any(present.get(name) != digest for name, digest in wanted.items()):
        runtime.import_archive(archive)
    return list(wanted)


def remove_replaced(runtime: Runtime, archives: Path) -> None:
    """Remove built images of which there is no archive any more. Nothing may be running yet."""
    present = runtime.list_images()
    kept = {digest for archive in archives.glob("*.tar") for digest in read_images(archive).values()}
    replaced = {digest for name, digest in present.items() if name.startswith(BUILT_PREFIX)} - kept
    names = [name for name, digest in present.items() if digest in replaced]
    if names:
        runtime.remove_images(names)


def _write_program_image(archive: Path, image: str, binary: Path, program: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        layer = Path(scratch) / "layer.tar"
        write_layer(layer, [(binary, program)])
        write_image(archive, name=image, layer=layer, config={"Entrypoint": [f"/{program}"]})
