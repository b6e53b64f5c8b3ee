"""Compiling the CPU kernels, choosing among the libraries, and calling into the one that was chosen."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quire_kernels import backend_summary, build
from quire_kernels._cpu import native, variants
from quire_kernels.build import BuildError
from quire_kernels.device import Backend, backend_for

SOURCE = """
#include "value.h"
extern "C" __attribute__((visibility("default"))) long quire_abi_version() { return QUIRE_ABI_VERSION + OFFSET; }
extern "C" __attribute__((visibility("default"))) long quire_init() { return REFUSAL; }
extern "C" __attribute__((visibility("default"))) long value() { return VALUE; }
"""
HEADER = """
#define VALUE 1
#define OFFSET 0
#if defined(QUIRE_ISA_AMX)
#define REFUSAL 1
#else
#define REFUSAL 0
#endif
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A small set of sources whose AMX variant is refused by its init function with EPERM."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "a.cpp").write_text(SOURCE)
    (folder / "value.h").write_text(HEADER)
    return folder


@pytest.fixture
def lib_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the loader looks for libraries."""
    folder = tmp_path / "lib"
    monkeypatch.setattr(native, "library_path", lambda isa: variants.library_path(isa, folder))
    return folder


def test_a_library_is_rebuilt_only_when_something_changed(sources: Path, tmp_path: Path) -> None:
    def is_fresh(**options: bool) -> bool:
        [result] = build.build(["avx2"], source_dir=sources, lib_dir=tmp_path / "lib", **options)
        assert result.path == variants.library_path("avx2", tmp_path / "lib")
        return result.is_fresh

    assert is_fresh()
    assert not is_fresh()
    (sources / "value.h").write_text(HEADER.replace("VALUE 1", "VALUE 2"))
    assert is_fresh()
    assert ctypes.CDLL(str(variants.library_path("avx2", tmp_path / "lib"))).value() == 2
    (sources / "b.cpp").write_text("")
    assert is_fresh()
    assert is_fresh(is_forced=True)
    variants.library_path("avx2", tmp_path / "lib").unlink()
    assert is_fresh()
    assert sorted(path.suffix for path in (tmp_path / "lib").iterdir()) == [".sha256", ".so"]


def test_a_failed_build_names_the_error_and_leaves_the_old_library(sources: Path, tmp_path: Path) -> None:
    [before] = build.build(["avx2"], source_dir=sources, lib_dir=tmp_path / "lib")
    content = before.path.read_bytes()
    (sources / "a.cpp").write_text("this is not C++")
    with pytest.raises(BuildError, match=r"a\.cpp"):
        build.build(["avx2"], source_dir=sources, lib_dir=tmp_path / "lib")
    assert before.path.read_bytes() == content


def test_missing_compilers_and_sources_are_named(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BuildError, match="no C"):
        build.build(["avx2"], source_dir=tmp_path, lib_dir=tmp_path / "lib")
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(BuildError, match="CXX=no-such-compiler"):
        build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="install one"):
        build.find_compiler()


def test_the_compiler_is_cxx_or_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    [found] = build.find_compiler()
    assert shutil.which(found)
    monkeypatch.setenv("CXX", f"{found} -DX=1")
    assert build.find_compiler() == [found, "-DX=1"]


def test_the_command_line_reports_each_library(built_libraries: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([argument for isa in native.supported_isas() for argument in ("--isa", isa)]) == 0
    output = capsys.readouterr().out
    for isa in native.supported_isas():
        assert f"up to date: {variants.library_path(isa)}" in output


def test_the_command_line_fails_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main([]) == 1
    assert "error: CXX=no-such-compiler" in capsys.readouterr().err


def test_every_bound_kernel_exists_in_every_library(isa: str) -> None:
    assert native.isa() == isa
    assert (native.library() is None) == (isa == native.NO_ISA)


def test_kernels_share_the_thread_pool_of_torch(isa: str) -> None:
    if native.library() is None:
        return
    num_threads = native.bind("quire_num_threads", [], native.INT64)
    before = torch.get_num_threads()
    try:
        for count in (1, 3, before):
            torch.set_num_threads(count)
            assert num_threads.call() == count
    finally:
        torch.set_num_threads(before)


def test_torch_and_the_kernels_load_one_openmp_runtime(native_isa: str) -> None:
    """Asked in a process of its own, for other packages of the tests bring runtimes too."""
    code = (
        "import torch\n"
        "from quire_kernels._cpu import native\n"
        "assert native.library() is not None\n"
        "print(open('/proc/self/maps').read())"
    )
    environment = {**os.environ, "QUIRE_CPU_ISA": native_isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    runtimes = {line.split()[-1] for line in done.stdout.splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    with pytest.raises(native.NativeError, match="QUIRE_CPU_ISA=sse is not one of amx, avx512, avx2, none"):
        native._choose("sse")


def test_an_instruction_set_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "avx512f"}))
    assert native.supported_isas() == ["avx2"]
    with pytest.raises(native.NativeError, match="this CPU has no amx"):
        native._choose("amx")


def test_none_chooses_torch() -> None:
    assert native._choose("none") == (None, "none")
    with native.use_isa("none"):
        assert backend_for(torch.zeros(1)) is Backend.TORCH
        assert backend_summary() == "cpu (torch)"


def test_summary_and_backend_follow_the_library(isa: str) -> None:
    labels = {"amx": "cpu (amx)", "avx512": "cpu (avx512_bf16)", "avx2": "cpu (avx2)", "none": "cpu (torch)"}
    assert backend_summary() == labels[isa]
    expected = Backend.TORCH if isa == "none" else Backend.NATIVE
    assert backend_for(torch.zeros(1)) is expected
    assert backend_for(torch.zeros(1).bfloat16()) is expected
    assert backend_for(torch.zeros(1).half()) is Backend.TORCH
    assert backend_for(torch.zeros(1, device="meta")) is Backend.TORCH
    assert backend_summary("meta") == "meta"


def test_without_libraries_there_is_one_warning_with_the_remedy(
    lib_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "supported_isas", lambda: ["avx512", "avx2"])
    assert native._choose(None) == (None, "none")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "run on torch" in record.message
    assert "python -m quire_kernels.build" in record.message


def test_an_unsupported_cpu_is_no_reason_to_warn(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    assert native._choose(None) == (None, "none")
    assert not caplog.records


def test_a_refusal_by_the_kernel_falls_back_to_the_next_best(
    sources: Path, lib_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "supported_isas", lambda: ["amx", "avx2"])
    build.build(["amx", "avx2"], source_dir=sources, lib_dir=lib_dir)
    library, name = native._choose(None)
    assert (library is not None, name) == (True, "avx2")
    [record] = caplog.records
    assert os.strerror(1) in record.message
    with pytest.raises(native.NativeError, match="does not let this process use amx"):
        native._choose("amx")


def test_a_library_of_another_version_is_refused(sources: Path, lib_dir: Path) -> None:
    (sources / "value.h").write_text(HEADER.replace("OFFSET 0", "OFFSET 1"))
    [isa] = native.supported_isas()[-1:]
    build.build([isa], source_dir=sources, lib_dir=lib_dir)
    with pytest.raises(native.NativeError, match="another version"):
        native._choose(isa)


def test_a_library_without_a_bound_kernel_is_refused(sources: Path, lib_dir: Path) -> None:
    [isa] = native.supported_isas()[-1:]
    build.build([isa], source_dir=sources, lib_dir=lib_dir)
    active = native.isa()
    with pytest.raises(native.NativeError, match=r"has no quire_.*python -m quire_kernels\.build"), native.use_isa(isa):
        pass
    assert native.isa() == active


def test_a_call_without_a_library_is_an_error() -> None:
    function = native.bind("quire_num_threads", [], native.INT64)
    with native.use_isa("none"), pytest.raises(native.NativeError, match="quire_num_threads"):
        function.call()
