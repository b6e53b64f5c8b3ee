"""What goes into an image's virtual environment: its requirements, and what of them no running process reads.

Used by the Dockerfile's build stages only. `install` takes an extra's dependencies from pyproject.toml alone, so that
they stay cached while only the sources change. Afterwards, what only developers of the dependencies need is removed,
and the rest compiled, because the images run on a read-only root and never write bytecode.
"""

import argparse
import compileall
import py_compile
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Below site-packages. Each was found unread by the process of the image; whoever adds one runs every image once.
UNREAD = (
    "torch/include",
    "torch/test",
    "torch/share",
    "torch/lib/*.a",
    "torch/bin/protoc*",
    "torch/bin/*Test",
    "torch/bin/test_*",
    "torch/bin/upgrader_models",
    "torch/lib/*_test.so",
    "torch/lib/libaoti_custom_ops.so",  # these two are tests as well
    "torch/lib/libbackend_with_compiler.so",
    "torch/testing/_internal/generated",
    "kubernetes/client/api/[a-z]*.py",  # the typed API: `test_imports.py` holds that nothing of these is imported
    "kubernetes/aio/client/api/[a-z]*.py",
    "kubernetes/aio/client/models/[a-z]*.py",
    "**/*.pyi",
    "**/*.pxd",
    "**/*.c",
)
# Packages that keep all they have. Triton compiles the C sources in its backends when it first meets a GPU.
WHOLE = ("triton",)
PROGRAMS = ("python*", "quire")
# `torch.testing` and `numpy.testing` are no tests in this sense: the packages themselves import them.
TESTS = ("numpy/**/tests", "sympy/**/tests", "sympy/**/benchmarks", "networkx/**/tests", "psutil/tests", "zmq/tests")


def read_requirements(pyproject: Path, extras: Sequence[str]) -> Iterator[str]:
    """Yield the project's own dependencies and those of some extras. Raises KeyError for an unknown extra."""
    project = tomllib.loads(pyproject.read_text())["project"]
    yield from project["dependencies"]
    for extra in extras:
        yield from project["optional-dependencies"][extra]


def remove_unread(site_packages: Path) -> int:
    """Delete what is listed above; return how many bytes that was."""
    freed = 0
    for pattern in (*UNREAD, *TESTS):
        for path in sorted(site_packages.glob(pattern)):
            is_kept = path.relative_to(site_packages).parts[0] in WHOLE
            if is_kept or not path.exists():  # the latter: below a folder that has just gone
                continue
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            freed += sum(file.lstat().st_size for file in files)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return freed


def compile_all(site_packages: Path) -> None:
    """Write bytecode that is valid whatever the sources' times are: copying an image's layers may change those."""
    for cache in sorted(site_packages.rglob("__pycache__")):
        shutil.rmtree(cache)
    sources = sorted(site_packages.rglob("*.py"))
    with ProcessPoolExecutor() as pool:
        list(pool.map(_compile, sources, chunksize=64))


def _compile(source: Path) -> None:
    # A template, or a file for another version of Python, does not compile; nothing imports it either.
    compileall.compile_file(source, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def install(arguments: argparse.Namespace) -> None:
    """Install the extras' requirements into the prefix. Raises CalledProcessError when pip fails."""
    options: list[str] = []
    if arguments.wheels.is_dir():
        options += ["--find-links", str(arguments.wheels)]
        if (constraints := arguments.wheels / "constraints.txt").exists():
            options += ["--constraint", str(constraints)]
    if arguments.index:
        options += ["--extra-index-url", arguments.index]
    requirements = read_requirements(arguments.pyproject, arguments.extras)
    python = str(arguments.prefix / "bin/python")
    subprocess.run([arguments.pip, "--python", python, "install", "--quiet", *options, *requirements], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", type=Path, default=Path("/opt/quire"))
    commands = parser.add_subparsers(dest="command", required=True)
    installing = commands.add_parser("install", help="install extras, then finish")
    installing.add_argument("extras", nargs="+")
    installing.add_argument("--pyproject", type=Path, default=Path("pyproject.toml"))
    installing.add_argument("--pip", required=True)
    installing.add_argument("--wheels", type=Path, required=True, help="a folder; tried before any index")
    installing.add_argument("--index", default="", help="a further index")
    commands.add_parser("finish", help="remove what is unread, compile the rest")
    arguments = parser.parse_args()
    if arguments.command == "install":
        install(arguments)
    for program in sorted(arguments.prefix.glob("bin/*")):
        if not any(program.match(name) for name in PROGRAMS):
            shutil.rmtree(program) if program.is_dir() else program.unlink()
    for site_packages in sorted(arguments.prefix.glob("lib/python3*/site-packages")):
        freed = remove_unread(site_packages)
        compile_all(site_packages)
        print(f"{site_packages}: {freed / 1e6:.0f} MB of unread files removed, the rest compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
