"""Compile the CPU kernels: `python -m quire_kernels.build`.

Owns how `_cpu/csrc/*.cpp` become `_cpu/lib/libquire_cpu_<isa>.so`, one shared library per instruction set. A library is
rebuilt only when its sources, its options or the compiler changed (a digest lies beside it); it appears under its final
name whole or not at all, so a running server is never disturbed.

The libraries do not name an OpenMP runtime: `_cpu.native` gives them the one that torch has loaded, so that there is
exactly one thread pool in the process.
"""

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quire_kernels._cpu.variants import ABI_VERSION, ISA_TO_COMPILER_OPTIONS, LIB_DIR, SOURCE_DIR, library_path

# No -ffast-math: -inf masks attention and NaN must stay visible. -Wno-maybe-uninitialized: g++'s own AVX-512 headers.
COMMON_OPTIONS = (
    *("-std=c++17", "-O3", "-g0", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", f"-DQUIRE_ABI_VERSION={ABI_VERSION}"),
)
LINK_OPTIONS = ("-shared", "-static-libgcc", "-static-libstdc++", "-Wl,-O1", "-Wl,--as-needed")


class BuildError(Exception):
    """The kernels could not be compiled; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """One instruction set's library. `is_fresh` is true when this call compiled it."""

    isa: str
    path: Path
    is_fresh: bool


def find_compiler() -> list[str]:
    """Return the C++ compiler's command: $CXX, else g++, else c++. Raises BuildError when there is none."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX={command[0]} is not an executable on PATH")
        return command
    for name in ("g++", "c++"):
        if shutil.which(name) is not None:
            return [name]
    raise BuildError(
        "no C++ compiler found (tried g++ and c++); install one, such as `apt-get install g++`, or set CXX. "
        "Without the native kernels Quire runs on torch's own operators, slower."
    )


def build(
    isas: Sequence[str] = tuple(ISA_TO_COMPILER_OPTIONS),
    *,
    source_dir: Path = SOURCE_DIR,
    lib_dir: Path = LIB_DIR,
    is_forced: bool = False,
    jobs: int | None = None,
) -> list[BuildResult]:
    """Bring the libraries of `isas` up to date and return them. Raises BuildError."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(
            f"native kernels exist for Linux on x86-64 only, this is {platform.system()} {platform.machine()}"
        )
    compiler = find_compiler()
    version = _run([*compiler, "--version"]).splitlines()[0]
    sources = sorted(source_dir.glob("*.cpp"))
    if not sources:
        raise BuildError(f"no C++ sources in {source_dir}")
    lib_dir.mkdir(parents=True, exist_ok=True)
    digests = {isa: _digest(source_dir, isa, [*compiler, version]) for isa in isas}
    stale = [isa for isa in isas if is_forced or not _is_current(library_path(isa, lib_dir), digests[isa])]
    with tempfile.TemporaryDirectory(dir=lib_dir, prefix=".build-") as scratch:
        _compile(compiler, sources, stale, Path(scratch), jobs or os.cpu_count() or 1)
        for isa in stale:
            target = library_path(isa, lib_dir)
            os.replace(Path(scratch) / target.name, target)
            _digest_path(target).write_text(digests[isa])
    return [BuildResult(isa=isa, path=library_path(isa, lib_dir), is_fresh=isa in stale) for isa in isas]


def _compile(compiler: list[str], sources: list[Path], isas: list[str], scratch: Path, jobs: int) -> None:
    def compile_one(isa: str, source: Path) -> Path:
        target = scratch / f"{isa}_{source.stem}.o"
        _run([*compiler, *COMMON_OPTIONS, *ISA_TO_COMPILER_OPTIONS[isa], "-c", str(source), "-o", str(target)])
        return target

    def link_one(isa: str) -> None:
        objects = [str(scratch / f"{isa}_{source.stem}.o") for source in sources]
        _run([*compiler, *LINK_OPTIONS, *objects, "-o", str(scratch / library_path(isa).name)])

    # The largest sources first, so that none of them is compiled alone at the end.
    units = sorted(((isa, source) for isa in isas for source in sources), key=lambda unit: -unit[1].stat().st_size)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda unit: compile_one(*unit), units))
        list(pool.map(link_one, isas))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed with status {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout


def _digest(source_dir: Path, isa: str, compiler: list[str]) -> str:
    digest = hashlib.sha256(
        "\0".join([*compiler, *COMMON_OPTIONS, *LINK_OPTIONS, *ISA_TO_COMPILER_OPTIONS[isa]]).encode()
    )
    for path in sorted([*source_dir.glob("*.cpp"), *source_dir.glob("*.h")]):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _digest_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_current(library: Path, digest: str) -> bool:
    stamp = _digest_path(library)
    return library.exists() and stamp.exists() and stamp.read_text() == digest


def main(arguments: Sequence[str] | None = None) -> int:
    """Build from the command line; print one line per library. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m quire_kernels.build", description="Compile Quire's CPU kernels.")
    parser.add_argument(
        "--isa",
        action="append",
        choices=tuple(ISA_TO_COMPILER_OPTIONS),
        help="only this one (repeatable); default: all",
    )
    parser.add_argument("--force", action="store_true", help="compile even what is up to date")
    parser.add_argument("--jobs", type=int, default=None, metavar="N", help="compilers at a time; default: one per CPU")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        results = build(options.isa or tuple(ISA_TO_COMPILER_OPTIONS), is_forced=options.force, jobs=options.jobs)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for result in results:
        print(f"{'built' if result.is_fresh else 'up to date'}: {result.path}")
    print(f"done in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
