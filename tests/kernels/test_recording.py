"""Recorded computations against the same computed again."""

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import quire_kernels as kernels
from quire_kernels import recording as recording_module
from quire_kernels._cpu import native
from quire_kernels.recording import NotRecordableError, Workspace, record


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def build_stack(
    x: Tensor, *, num_layers: int = 4, between: Callable[[Tensor], Tensor] = lambda h: h
) -> Callable[[], Tensor]:
    """A decoder in small: norms with residuals, products, activations; `between` runs once per layer."""
    generator = torch.Generator().manual_seed(0)
    size = x.shape[1]
    norm = torch.rand(size, generator=generator) + 0.5
    up = kernels.pack_weight((torch.randn(2 * size, size, generator=generator) / 8).to(x.dtype))
    down = kernels.pack_weight((torch.randn(size, size, generator=generator) / 8).to(x.dtype))

    def compute() -> Tensor:
        hidden, residual = kernels.rms_norm(x, norm, 1e-5, x)
        for _ in range(num_layers):
            hidden = between(kernels.linear(kernels.gated_activation(kernels.linear(hidden, up), "silu"), down))
            hidden, residual = kernels.rms_norm(hidden, norm, 1e-5, residual)
        return kernels.linear(hidden, down, out_dtype=torch.float32)

    return compute


def random(num_tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x: Tensor, compute: Callable[[], Tensor]) -> recording_module.Recording:
    """Record, then replay on other inputs; each must be what the computation itself returns."""
    recorded = record(compute, Workspace())
    assert torch.equal(recorded.result, compute())
    for seed in range(3):
        x.copy_(random(x.shape[0], seed + 10, x.dtype))
        expected = compute()
        assert not torch.equal(recorded.result, expected)
        assert torch.equal(recorded.replay(), expected)
    return recorded


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
def test_native_calls_alone_are_one_step(native_isa: str, num_tokens: int) -> None:
    x = random(num_tokens, 0)
    recorded = check(x, build_stack(x))
    assert len(recorded._steps) == 1


@pytest.mark.parametrize(
    "between",
    [lambda h: h.mul_(0.5), lambda h: h * 0.5, lambda h: h + h, lambda h: h.float().tanh().to(torch.bfloat16)],
    ids=["in place", "functional", "of itself", "in another dtype"],
)
def test_operators_of_torch_between_native_calls(native_isa: str, between: Callable[[Tensor], Tensor]) -> None:
    x = random(3, 0)
    check(x, build_stack(x, between=between))


def test_views_are_free(native_isa: str) -> None:
    x = random(3, 0)
    compute = build_stack(
        x, between=lambda h: h.view(3, 2, 32).split_with_sizes((1, 1), 1)[0].expand(3, 2, 32).reshape(3, 64)
    )
    check(x, compute)


def test_float32_runs_its_products_on_torch(native_isa: str) -> None:
    x = random(3, 0, torch.float32)
    check(x, build_stack(x))


def test_memory_is_used_again_within_a_recording_and_by_the_next(native_isa: str) -> None:
    """Deeper costs nothing; several recordings cost as much as the largest. A recording stays right after others."""
    x = random(4, 0)
    shallow, deep = Workspace(), Workspace()
    first = record(build_stack(x, num_layers=2), shallow)
    second = record(build_stack(x, num_layers=8), deep)
    assert shallow.size_bytes == deep.size_bytes > 0
    before = deep.size_bytes
    for num_layers in (1, 5, 7):
        record(build_stack(x, num_layers=num_layers), deep).replay()
        assert deep.size_bytes == before
    assert torch.equal(second.replay(), build_stack(x, num_layers=8)())
    assert torch.equal(first.replay(), build_stack(x, num_layers=2)())


def test_slots_come_back_only_when_all_views_are_gone() -> None:
    workspace = Workspace()
    tensor = workspace.empty((100, 8), torch.float32)
    assert tensor.data_ptr() % 64 == 0
    address, view = tensor.data_ptr(), tensor[3:5]
    del tensor
    gc.collect()
    assert workspace.empty((100, 8), torch.float32).data_ptr() != address
    alias = workspace.alias(view)
    assert (alias.data_ptr(), alias.shape, alias.stride()) == (view.data_ptr(), view.shape, view.stride())
    del view
    assert workspace.empty((100, 8), torch.float32).data_ptr() == address


def test_reading_values_is_refused(native_isa: str) -> None:
    x = random(2, 0)
    compute = build_stack(x, between=lambda h: h if float(h.sum()) > 0 else -h)
    with pytest.raises(NotRecordableError, match="reads values"):
        record(compute, Workspace())
    assert torch.equal(compute(), compute())  # the kernels are themselves again


def test_without_native_kernels_nothing_is_recorded() -> None:
    with native.use_isa(native.NO_ISA), pytest.raises(NotRecordableError, match="no native kernels"):
        record(lambda: torch.zeros(1), Workspace())


def test_a_kernel_that_refuses_its_arguments_is_heard(native_isa: str) -> None:
    packed = kernels.pack_weight(random(8, 0))
    ids = torch.tensor([0, 7])
    recorded = record(lambda: kernels.gather_rows(packed, ids), Workspace())
    ids[1] = 8
    with pytest.raises(RuntimeError, match="recorded kernel call 0 of 1 failed"):
        recorded.replay()
    ids[1] = 5
    assert torch.equal(recorded.replay(), random(8, 0)[[0, 5]])
