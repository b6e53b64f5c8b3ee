"""Images built from the repository's Dockerfile: by buildah, in a store of its own, on a base made by debootstrap.

No registry is asked for an image. An image's name carries a digest of what it is made from, so an unchanged one is not
built again, and a changed one rolls out. What the build needs of this machine (its certificates, pip's settings) is
mounted while the build runs and is not in the image.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.images import BUILT_PREFIX
from cluster.oci import write_image
from cluster.packages import PROVIDES, ensure_packages
from cluster.paths import REPOSITORY, Paths
from cluster.shell import ClusterError, locked, run, run_logged

BASE_IMAGE = f"{BUILT_PREFIX}base:bookworm"
_SUITE = "bookworm"
_BASE_PACKAGES = ("ca-certificates", "libgomp1", "python3", "python3-venv")
_BASE_RECIPE = 1  # raise it where the steps below change what comes out
# What a container never reads, or what must not carry this machine's name and addresses into an image.
_BASE_LEFT_OUT = (
    *(
        "./dev/*",
        "./etc/hostname",
        "./etc/machine-id",
        "./etc/resolv.conf",
        "./proc/*",
        "./run/*",
        "./sys/*",
        "./tmp/*",
    ),
    *("./usr/share/doc/*", "./usr/share/info/*", "./usr/share/locale/*", "./usr/share/man/*"),
    *("./var/cache/*", "./var/lib/apt/lists/*", "./var/log/*"),
)
_CERTIFICATES = Path("/etc/ssl/certs")
_BUILD_TIMEOUT_S = 1800.0
_NUM_BUILDS_KEPT = 3
_STORE_LIMIT_BYTES = 12 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltImage:
    """An image and where it lies as an OCI archive, ready for `Node.load_image`."""

    name: str
    archive: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file that an image is made from, by the name that counts for the image's key."""

    name: str
    path: Path


def base_image() -> str:
    """Return the name of the base image, which is in buildah's store then: Debian with Python, and no more."""
    paths = Paths.from_environment()
    with locked(paths.images_lock):
        _pull_base(paths, _ensure_base_archive(paths))
    return BASE_IMAGE


def base_archive() -> Path:
    """Return the base image as an OCI archive."""
    paths = Paths.from_environment()
    with locked(paths.images_lock):
        return _ensure_base_archive(paths)


def build_image(
    target: str,
    *,
    sources: Sequence[str],
    build_args: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    directories: Sequence[Path] = (),
) -> BuiltImage:
    """Build a target of the repository's Dockerfile unless it was built from the very same inputs before.

    `sources` are the paths in the repository that go into the image, `extra` further arguments of `buildah build`. With
    the Dockerfile and the content of `directories` (those that `extra` refers to, say one of wheels) they decide
    whether it is built again.
    """
    paths = Paths.from_environment()
    arguments = [
        *(f"--build-arg={name}={value}" for name, value in {"BASE_IMAGE": BASE_IMAGE, **(build_args or {})}.items()),
        *extra,
    ]
    with locked(paths.images_lock):
        base = _ensure_base_archive(paths)
        key = compute_key(
            [target, base.name, *arguments],
            [*list_sources(REPOSITORY, ["Dockerfile", ".dockerignore", *sources]), *_list_files(directories)],
        )
        image = BuiltImage(name=f"{BUILT_PREFIX}{target}:{key}", archive=paths.archives / f"image-{target}-{key}.tar")
        if not image.archive.exists():
            ensure_packages(PROVIDES)
            _clear_store(paths)
            _pull_base(paths, base)
            _build(paths, target, image, arguments)
            _forget_old(paths, target)
    return image


def list_sources(repository: Path, sources: Sequence[str]) -> list[InputFile]:
    """Return the files under the given paths that git tracks or would, in order, with their names in the repository."""
    output = run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *sources], cwd=repository
    )
    names = sorted(set(output.split("\0")) - {""})
    return [InputFile(name=name, path=repository / name) for name in names if (repository / name).is_file()]


def compute_key(words: Iterable[str], files: Iterable[InputFile]) -> str:
    """Return a digest of words and of files' names, modes and content; where the files lie does not matter."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode() + b"\0")
    for file in files:
        with file.path.open("rb") as content:
            hashed = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.name}\0{file.path.stat().st_mode & 0o111}\0{hashed}\0".encode())
    return digest.hexdigest()[:12]


def _list_files(directories: Sequence[Path]) -> list[InputFile]:
    return [
        InputFile(name=str(path.relative_to(directory)), path=path)
        for directory in directories
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]


def _build(paths: Paths, target: str, image: BuiltImage, arguments: Sequence[str]) -> None:
    log = paths.build_logs / f"image-{target}.log"
    log.unlink(missing_ok=True)
    print(f"Building the image {target} ({log})", flush=True)
    command = [
        *("build", "--layers", "--pull-never", "--network", "host", "--target", target, "--tag", image.name),
        *("--file", str(REPOSITORY / "Dockerfile"), *_machine_mounts(paths), *arguments, str(REPOSITORY)),
    ]
    run_logged(_buildah_command(paths, command), log, env=_environment(paths), timeout_s=_BUILD_TIMEOUT_S)
    unfinished = image.archive.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    _buildah(paths, ["push", "--quiet", image.name, f"oci-archive:{unfinished}:{image.name}"])
    unfinished.rename(image.archive)


def _ensure_base_archive(paths: Paths) -> Path:
    """Make the base image's archive where it is missing."""
    recipe = compute_key([str(_BASE_RECIPE), _SUITE, *_BASE_PACKAGES, *_BASE_LEFT_OUT], [])
    archive = paths.archives / f"base-{recipe}.tar"
    if archive.exists():
        return archive
    ensure_packages(PROVIDES)
    log = paths.build_logs / "base-image.log"
    log.unlink(missing_ok=True)
    print(f"Making the base image ({log})", flush=True)
    paths.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.root) as scratch:
        root = Path(scratch) / "root"
        mirror = [given] if (given := os.environ.get("QUIRE_DEBIAN_MIRROR")) else []
        include = f"--include={','.join(_BASE_PACKAGES)}"
        run_logged(["debootstrap", "--variant=minbase", include, _SUITE, str(root), *mirror], log)
        layer = Path(scratch) / "layer.tar"
        left_out = [f"--exclude={pattern}" for pattern in _BASE_LEFT_OUT]
        run(["tar", "-C", root, "--numeric-owner", "--sort=name", *left_out, "-cf", layer, "."], timeout_s=300)
        config = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/sh"]}
        write_image(archive, name=BASE_IMAGE, layer=layer, config=config)
    return archive


def _machine_mounts(paths: Paths) -> list[str]:
    """Return the arguments that lend a build this machine's certificates and pip settings."""
    mounts = []
    if _CERTIFICATES.is_dir():
        mounts.append(f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro")
        # A link may lead to where the machine keeps certificates of its own.
        own = Path("/usr/local/share/ca-certificates")
        if own.is_dir() and any(own.iterdir()):
            mounts.append(f"--volume={own}:{own}:ro")
    settings = parse_pip_settings(_read_pip_settings())
    if (_CERTIFICATES / "ca-certificates.crt").exists():
        settings.setdefault("cert", str(_CERTIFICATES / "ca-certificates.crt"))
    configuration = paths.buildah / "pip.conf"
    configuration.parent.mkdir(parents=True, exist_ok=True)
    configuration.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    mounts.append(f"--volume={configuration}:/etc/pip.conf:ro")
    return mounts


def _read_pip_settings() -> str:
    try:
        return run(["python3", "-m", "pip", "config", "list"])
    except ClusterError:
        return ""  # no pip here: nothing is configured for it


def parse_pip_settings(listing: str) -> dict[str, str]:
    """Return what `pip config list` says of how packages are reached; an environment variable wins over a file."""
    passed_on = ("cert", "default-timeout", "extra-index-url", "index-url", "proxy", "timeout", "trusted-host")
    settings = {}
    rows = [line.partition("=") for line in listing.splitlines()]
    for key, _, value in sorted(rows, key=lambda row: row[0].startswith(":env:")):
        name = key.removeprefix(":env:.").rpartition(".")[2]
        if name in passed_on:
            settings[name] = value.strip().strip("'\"").replace("\\n", " ")
    return settings


def _forget_old(paths: Paths, target: str) -> None:
    """Remove all but the newest builds of a target: their archives, and their names in the store.

    More than one stays, for another process may be about to load the one before.
    """
    archives = sorted(paths.archives.glob(f"image-{target}-*.tar"), key=lambda path: path.stat().st_mtime)
    for archive in archives[:-_NUM_BUILDS_KEPT]:
        archive.unlink()
    kept = {f"{BUILT_PREFIX}{target}:{archive.stem.rpartition('-')[2]}" for archive in archives[-_NUM_BUILDS_KEPT:]}
    listed = run(_buildah_command(paths, ["images", "--format", "{{.Name}}:{{.Tag}}"]), env=_environment(paths)).split()
    old = [name for name in listed if name.startswith(f"{BUILT_PREFIX}{target}:") and name not in kept]
    if old:
        _buildah(paths, ["rmi", *old])


def _clear_store(paths: Paths) -> None:
    """Remove what killed builds have left, and all layers once they are many: a build then begins anew."""
    _buildah(paths, ["rm", "--all"])
    layers = paths.buildah / "root" / "overlay"
    if layers.exists() and int(run(["du", "-s", "-B1", layers]).split()[0]) > _STORE_LIMIT_BYTES:
        _buildah(paths, ["rmi", "--all", "--force"])
        for pulled in paths.buildah.glob("*.pulled"):
            pulled.unlink()


def _pull_base(paths: Paths, archive: Path) -> None:
    """Have the base image in buildah's store, as it is in the archive."""
    pulled = paths.buildah / f"{archive.stem}.pulled"
    if not pulled.exists():
        _buildah(paths, ["pull", "--quiet", f"oci-archive:{archive}"])
        pulled.touch()


def _buildah(paths: Paths, arguments: Sequence[str]) -> str:
    return run(_buildah_command(paths, arguments), env=_environment(paths), timeout_s=_BUILD_TIMEOUT_S)


def _environment(paths: Paths) -> dict[str, str]:
    """Return the variables for buildah. Without settings of its own it makes /etc/cni, which it never uses."""
    settings = paths.buildah / "containers.conf"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(f'[network]\nnetwork_config_dir = "{paths.buildah / "networks"}"\n')
    return {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay", "CONTAINERS_CONF": str(settings)}


def _buildah_command(paths: Paths, arguments: Sequence[str]) -> list[str]:
    return ["buildah", "--root", str(paths.buildah / "root"), "--runroot", str(paths.buildah / "run"), *arguments]
