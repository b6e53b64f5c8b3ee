"""What a machine lacks costs speed, not the run: huge pages, and instructions that a benchmark's peer needs."""

import errno
import importlib.util
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from quire_kernels._cpu.arena import Arena

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", BENCHMARKS / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapping)


@pytest.mark.usefixtures("no_huge_pages")
def test_without_huge_pages_there_are_small_ones(benchmark: ModuleType) -> None:
    assert not Arena(1 << 16).empty(100).any()
    assert not benchmark.huge_pages(100).any()


def fail(error: Exception) -> Callable[[], object]:
    def run() -> object:
        raise error

    return run


@pytest.mark.parametrize("error", [RuntimeError("needs avx512bw\nat line 3"), AttributeError("no such operator")])
def test_a_peer_that_cannot_run_is_left_out_with_a_word(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    providers = {benchmark.READ: int, benchmark.OURS: int, "peer": fail(error), "other": int}
    case = benchmark.Case(what="linears", parameters={}, providers=providers, num_bytes=1, num_flops=0)
    rows = benchmark.measure(case, seconds=0.0)
    assert [row.provider for row in rows] == [benchmark.READ, benchmark.OURS, "other"]
    assert f"peer cannot run here and is left out: {str(error).splitlines()[0]}" in capsys.readouterr().out


def test_our_own_fault_is_one(benchmark: ModuleType) -> None:
    providers = {benchmark.READ: int, benchmark.OURS: fail(RuntimeError("ours"))}
    case = benchmark.Case(what="linears", parameters={}, providers=providers, num_bytes=1, num_flops=0)
    with pytest.raises(RuntimeError, match="ours"):
        benchmark.measure(case, seconds=0.0)
