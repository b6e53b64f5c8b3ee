"""The instruction sets that the CPU kernels exist for, and where each one's library lies; for build and loader."""

from pathlib import Path
from typing import Final

SOURCE_DIR: Final = Path(__file__).parent / "csrc"
LIB_DIR: Final = Path(__file__).parent / "lib"

_AVX2_FLAGS = frozenset({"avx2", "fma", "f16c"})
_AVX512_FLAGS = _AVX2_FLAGS | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}

ABI_VERSION: Final = 2
"""Raised whenever an exported function's arguments or the packed layout change."""

# Best first; the flags are /proc/cpuinfo's.
ISA_TO_CPU_FLAGS: Final[dict[str, frozenset[str]]] = {
    "amx": _AVX512_FLAGS | {"amx_tile", "amx_bf16"},
    "avx512": _AVX512_FLAGS,
    "avx2": _AVX2_FLAGS,
}

_AVX2_OPTIONS = ("-mavx2", "-mfma", "-mf16c")
_AVX512_OPTIONS = (
    *_AVX2_OPTIONS,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mprefer-vector-width=512"),
)

ISA_TO_COMPILER_OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "amx": (*_AVX512_OPTIONS, "-mamx-tile", "-mamx-bf16", "-DQUIRE_ISA_AMX"),
    "avx512": (*_AVX512_OPTIONS, "-DQUIRE_ISA_AVX512"),
    "avx2": (*_AVX2_OPTIONS, "-DQUIRE_ISA_AVX2"),
}


def library_path(isa: str, lib_dir: Path = LIB_DIR) -> Path:
    """Return where the library of this instruction set lies once built."""
    return lib_dir / f"libquire_cpu_{isa}.so"
