"""Load the compiled CPU kernels that fit this CPU, and call them cheaply.

Owns which `lib/libquire_cpu_<isa>.so` is loaded (the best that the CPU and the kernel allow, or what QUIRE_CPU_ISA
says) and how its functions are declared. Does not know any op. Kernels are called with plain integers
(`tensor.data_ptr()`, sizes, strides); one that takes many gets them as one packed struct, which is cheaper:

    _rms_norm = bind("quire_rms_norm_bf16", [POINTER, POINTER, INT64, FLOAT])
    ...
    if library() is not None:
        _rms_norm.call(x.data_ptr(), weight.data_ptr(), x.shape[0], eps)

Invariants: at most one library is active; `bind` objects follow it; torch is imported first and the kernels use torch's
own OpenMP runtime, hence its thread pool and `torch.set_num_threads`.
"""

import ctypes
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from quire_kernels._cpu.variants import ABI_VERSION, ISA_TO_CPU_FLAGS, library_path

logger = logging.getLogger(__name__)

POINTER: Final = ctypes.c_void_p  # pass tensor.data_ptr(), or None
INT64: Final = ctypes.c_int64
INT32: Final = ctypes.c_int32
FLOAT: Final = ctypes.c_float

ISA_VARIABLE = "QUIRE_CPU_ISA"
NO_ISA = "none"
_HINT = "run `python -m quire_kernels.build`"


class NativeError(RuntimeError):
    """The native kernels that were asked for cannot be used here."""


class NativeFunction:
    """A kernel by name. `call` is the active library's function; it is only to be called while a library is active."""

    __slots__ = ("argtypes", "call", "name", "restype")

    call: Callable[..., Any]

    def __init__(self, name: str, argtypes: Sequence[Any], restype: Any) -> None:
        self.name = name
        self.argtypes = list(argtypes)
        self.restype = restype
        self.call = self._refuse

    def found_in(self, loaded: ctypes.CDLL | None) -> Callable[..., Any]:
        """Return this library's function, declared. Raises NativeError when the library does not have it."""
        if loaded is None:
            return self._refuse
        try:
            function = loaded[self.name]  # a fresh object: declarations of one library never leak into another
        except AttributeError as error:
            raise NativeError(f"{loaded._name} has no {self.name}; {_HINT}") from error
        function.argtypes = self.argtypes
        function.restype = self.restype
        return function

    def _refuse(self, *arguments: object) -> Any:
        raise NativeError(f"{self.name} was called without a native library")


@dataclass(slots=True)
class _Active:
    """What is active in this process; written only by `_activate`."""

    library: ctypes.CDLL | None = None
    isa: str = NO_ISA
    is_chosen: bool = False
    functions: list[NativeFunction] = field(default_factory=list)


_active = _Active()


def bind(name: str, argtypes: Sequence[Any], restype: Any = None) -> NativeFunction:
    """Declare the kernel `name` once, at import time; call it with `.call(...)` whenever `library()` is not None."""
    function = NativeFunction(name, argtypes, restype)
    if _active.library is not None:
        function.call = function.found_in(_active.library)
    _active.functions.append(function)
    return function


def functions() -> Sequence[NativeFunction]:
    """Return every kernel that was declared."""
    return tuple(_active.functions)


def library() -> ctypes.CDLL | None:
    """Return the active library, chosen on the first call; None where torch does the work. Raises NativeError."""
    if not _active.is_chosen:
        _activate(*_choose(os.environ.get(ISA_VARIABLE)))
    return _active.library


def isa() -> str:
    """Return the active instruction set: "amx", "avx512", "avx2" or "none"."""
    library()
    return _active.isa


def supported_isas() -> list[str]:
    """Return the instruction sets that this CPU has, best first, whether or not they are built."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return []
    flags = _cpu_flags()
    return [name for name, needed in ISA_TO_CPU_FLAGS.items() if needed <= flags]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the body with this instruction set active (`none`: torch does the work). For tests and benchmarks."""
    library()
    before = _active.library, _active.isa
    _activate(None if name == NO_ISA else _load(name), name)
    try:
        yield
    finally:
        _activate(*before)


def _activate(loaded: ctypes.CDLL | None, name: str) -> None:
    calls = [function.found_in(loaded) for function in _active.functions]
    for function, call in zip(_active.functions, calls, strict=True):
        function.call = call
    _active.library, _active.isa, _active.is_chosen = loaded, name, True


def _choose(wanted: str | None) -> tuple[ctypes.CDLL | None, str]:
    if wanted == NO_ISA:
        return None, NO_ISA
    if wanted:
        return _load(wanted), wanted
    refusal: NativeError | None = None
    for name in supported_isas():
        try:
            chosen: tuple[ctypes.CDLL | None, str] = _load(name), name
            break
        except NativeError as error:
            refusal = refusal or error
    else:
        chosen = None, NO_ISA
    if refusal is not None:
        on = "torch" if chosen[0] is None else chosen[1]
        logger.warning("CPU kernels run on %s, slower than this CPU could: %s", on, refusal)
    return chosen


def _load(name: str) -> ctypes.CDLL:
    """Load one variant and get it ready. Raises NativeError naming what is missing."""
    if name not in ISA_TO_CPU_FLAGS:
        raise NativeError(f"{ISA_VARIABLE}={name} is not one of {', '.join([*ISA_TO_CPU_FLAGS, NO_ISA])}")
    if name not in supported_isas():
        raise NativeError(
            f"this CPU has no {name} (it has: {', '.join(supported_isas()) or 'nothing Quire has kernels for'})"
        )
    path = library_path(name)
    if not path.exists():
        raise NativeError(f"the {name} library is not built; {_HINT}")
    _share_openmp_runtime()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"cannot load {path}: {error}") from error
    loaded.quire_abi_version.restype = ctypes.c_int64
    loaded.quire_init.restype = ctypes.c_int64
    if loaded.quire_abi_version() != ABI_VERSION:
        raise NativeError(f"{path} is from another version of Quire; {_HINT}")
    refusal = loaded.quire_init()
    if refusal != 0:
        raise NativeError(f"the kernel does not let this process use {name}: {os.strerror(refusal)}")
    return loaded


def _share_openmp_runtime() -> None:
    """Make the OpenMP runtime that torch loaded visible to the kernels, whatever its file is called."""
    torch.get_num_threads()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
    for path in sorted(paths):
        if os.path.basename(path).startswith(("libgomp", "libiomp5", "libomp")):
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
            return
    raise NativeError("this torch build has no OpenMP runtime")


def _cpu_flags() -> frozenset[str]:
    """Return the first CPU's flags; only its block is read, since many-core machines make /proc/cpuinfo long."""
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
