"""OCI image archives: write one with a single layer, read the names and digests of any. No image tool is needed.

Source: the OCI image specification 1.1, layout and manifest. containerd and buildah read what this writes.
"""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.shell import ClusterError

_NAME = "org.opencontainers.image.ref.name"
_CONTAINERD_NAME = "io.containerd.image.name"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_image(archive: Path, *, name: str, layer: Path, config: dict[str, Any]) -> None:
    """Write an archive of one image; its only layer is an uncompressed tar file, `config` what containers run with."""
    architecture = _ARCHITECTURES.get(platform.machine(), platform.machine())
    layer_digest = _digest_file(layer)
    image = {
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        "history": [{"created_by": "e2e/cluster"}],  # buildah wants an entry for each layer of what it builds on
    }
    image_bytes = json.dumps(image).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _describe("application/vnd.oci.image.config.v1+json", image_bytes),
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": layer_digest,
                "size": layer.stat().st_size,
            }
        ],
    }
    manifest_bytes = json.dumps(manifest).encode()
    entry = _describe("application/vnd.oci.image.manifest.v1+json", manifest_bytes)
    index = {"schemaVersion": 2, "manifests": [{**entry, "annotations": {_NAME: name, _CONTAINERD_NAME: name}}]}
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as tar:
        _add_bytes(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add_bytes(tar, "index.json", json.dumps(index).encode())
        for content in (image_bytes, manifest_bytes):
            _add_bytes(tar, _blob_path(_digest(content)), content)
        tar.add(layer, _blob_path(layer_digest))
    unfinished.rename(archive)


def write_layer(layer: Path, files: Sequence[tuple[Path, str]]) -> None:
    """Write executable files as a layer: pairs of the file and its path in the image."""
    with tarfile.open(layer, "w") as tar:
        for source, target in files:
            entry = tarfile.TarInfo(target.lstrip("/"))
            entry.size, entry.mode = source.stat().st_size, 0o755
            with source.open("rb") as content:
                tar.addfile(entry, content)


def read_images(archive: Path) -> dict[str, str]:
    """Return the digest of each image in an archive by its name. Raises ClusterError for what is no such archive."""
    try:
        with tarfile.open(archive) as tar:
            content = tar.extractfile("index.json")
            manifests = json.load(content)["manifests"] if content else []
        return {entry["annotations"][_NAME]: entry["digest"] for entry in manifests}
    except (OSError, tarfile.TarError, ValueError, KeyError) as error:
        raise ClusterError(f"{archive} is no OCI archive of named images: {error}") from error


def _describe(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(content), "size": len(content)}


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _digest_file(path: Path) -> str:
    with path.open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def _blob_path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _add_bytes(tar: tarfile.TarFile, path: str, content: bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
